"""How a page is stored: the packed layout, the codes and the rotation."""
