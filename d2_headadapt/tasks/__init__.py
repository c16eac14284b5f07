"""Classification tasks beside detection: per image and per box, each with a class table of its own."""
