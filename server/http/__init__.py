"""What every request passes, whichever API it speaks."""
