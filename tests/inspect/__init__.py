"""What EAH sees, in pictures."""
