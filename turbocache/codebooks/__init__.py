"""The levels that codes stand for, and how they were computed."""
