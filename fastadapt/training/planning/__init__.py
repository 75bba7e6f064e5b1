"""What a run needs: memory, arithmetic, devices."""
