"""Half precision as a property of the exported graph: which nodes compute in it, and the proof that they may."""
