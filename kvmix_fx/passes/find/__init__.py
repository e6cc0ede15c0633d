"""One file per kind of thing to find; each finder is a function of the graph and changes nothing."""
