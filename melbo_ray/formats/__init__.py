"""Files of steering vectors: those of this project and of other tools."""
