"""How a prefix travels: reading and checking saved folders."""
