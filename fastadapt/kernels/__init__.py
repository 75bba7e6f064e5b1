"""Operations on tensors, independent of models, files and configurations.

Each op is a package with a public function of the same name:

- :mod:`fastadapt.kernels.transcoder`: encoder, activation, sparse decode, decoder-norm penalty;
- :mod:`fastadapt.kernels.linear_kl`: language-model head and KL of one teacher and many students;
- :mod:`fastadapt.kernels.nmse`: normalised squared error of two streams;
- :mod:`fastadapt.kernels.frozen`: norms, gated products and rotary embeddings of frozen
  blocks, three functions.

:mod:`fastadapt.kernels.testing` compares an implementation with the op's reference in float64.
The ops' sources are in ``kernels/`` at the root of the repository.
"""

from fastadapt.kernels.vector_math import resolve_functions

resolve_functions()
