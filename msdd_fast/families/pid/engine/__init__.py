"""PiD's decode for the engine: packed weights, tables of what depends on time alone, network, program."""
