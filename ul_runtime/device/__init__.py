"""The sampling loop on a device: state, history, table and noise stay in its memory until the last step is done."""
