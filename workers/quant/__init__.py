"""ModelOpt's home: quantizers, calibration algorithms, block formats, and kernels of equal bits."""
