"""What training takes on GPUs that needn't be there, by formula: `meshes`; the GPUs themselves: `gpus`."""
