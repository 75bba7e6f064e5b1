"""A model linearized around a text: propagation rules, recorded states, backward passes."""
