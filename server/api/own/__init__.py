"""This server's own addresses: sessions, status, tokens and the page."""
