"""What all rooms need and nobody outside."""
