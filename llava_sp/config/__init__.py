"""What a run is: the dataclasses of its keys, and the YAML files and command line that fill them."""
