"""What recognisers share: reading values, rows, linear layers, experts and gates however a graph spells them."""
