"""The seed's table, measured: arms, what was found, how it is shown."""
