"""Functions on tensors: they know no model, no file and no configuration.

Each op is a package of its own, with a public function of the same name:

- :mod:`fastadapt.kernels.transcoder`: encoder, activation, sparse decode, decoder-norm penalty;
- :mod:`fastadapt.kernels.linear_kl`: language-model head and KL of one teacher and many students;
- :mod:`fastadapt.kernels.nmse`: normalised squared error of two streams.

:mod:`fastadapt.kernels.testing` compares an implementation with its float64 oracle.
Their sources lie in ``kernels/`` at the top of the repository.
"""
