"""What all commands share: options, folders, locks, signals, progress."""
