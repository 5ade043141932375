"""The demo: one trained network through each face of the engine, on real images, with honest times."""
