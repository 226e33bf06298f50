"""Other people's priors: the published network families, rebuilt from their tensors' names and shapes.

`invrecon import-weights` (`command`) reads tensors without executing anything (`sources`, `pickle`), finds the network
among them (`locate`), reads the architecture from their shapes (`infer`, `channels`) and the rest from what is stated
(`options`, `settings`), and writes a prior file (`convert`). `load_prior` builds such a prior again from its card: a
network (`guided_diffusion`, `edm`) that `denoiser` turns into `D(x, sigma)` (`preconditioning`).
"""
