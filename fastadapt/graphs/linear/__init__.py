"""The model made linear around a text: propagation rules, recorded states, backward passes."""
