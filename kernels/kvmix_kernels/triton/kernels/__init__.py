"""The kernels themselves, by job. Launching them is the business of the modules beside this folder."""
