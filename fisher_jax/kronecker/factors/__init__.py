"""The forms that a Kronecker factor takes, and how they are damped and solved."""
