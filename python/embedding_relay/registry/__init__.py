"""The bootstrap registry: encode ranks say where they listen, language ranks ask."""
