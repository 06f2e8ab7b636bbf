"""What travels over the wire: requests and answers of each API as pydantic models."""
