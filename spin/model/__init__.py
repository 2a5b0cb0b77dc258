"""From a model folder to a decoder: built, patched, sharded, compiled."""
