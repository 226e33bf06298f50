"""The demonstration in MRI: slices of an average brain from a fourth and an eighth of their k-space, eight coils.

Run by `make demo-mri` or `python -m invrecon.demo_mri`; writes `outputs/demo-mri/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invrecon.data.intensity import MAGNITUDE
from invrecon.data.mri import MRIData
from invrecon.demo import command_line, one_batch, open_prior, reconstruct, write_results
from invrecon.methods import FBP, AnnealedPnPADMM, Method, TotalVariation, WaveletL1
from invrecon.metrics.mri import magnitude, phase
from invrecon.operators import CartesianMRI, EquispacedLines, SNRNoise
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.weights import file_hash
from invrecon.tasks.reconstruction import Reconstruction

SIZE, NUM_COILS, SNR = 256, 8, 30.0
CENTERS = {4: 0.08, 8: 0.04}  # acceleration -> share of central columns, all of which are measured
METHODS: dict[str, Method] = {  # as in zero_filled_mri, tv_mri, wavelet_mri and recon_mri.yaml
    "Zero-filled": FBP(clip=None),
    "TV": TotalVariation(weight=1e-3, bounds=(-4.0, 4.0)),
    "Wavelet l1": WaveletL1(weight=1e-3, num_iterations=100, clip=None),
    "Patch diffusion": AnnealedPnPADMM(num_levels=48, sigma_max=0.9, sigma_min=0.03, clip=None),
}


def run(output: Path, prior_name: str, slices: str) -> dict[str, Any]:
    """Runs the demonstration and writes table, figures and page.

    Args:
        output: Folder to write.
        prior_name: A prior file, or the bare name of a shipped one.
        slices: Which slices of the shipped volume.

    Returns:
        The summary, by setting and method.

    Raises:
        InputError: The prior is missing, or not one of complex MR images.
    """
    from invrecon.report.complex import view
    from invrecon.report.figures import as_array, case_figure, image_png
    from invrecon.report.html import RESIDUAL, Comparison, Figure
    from invrecon.report.store import Part

    path, prior, card = open_prior(prior_name, MAGNITUDE, "complex MR images", "patch_mri.yaml")
    rows: dict[str, list[dict[str, Any]]] = {}
    figures, comparisons = [], []
    for acceleration, center in CENTERS.items():
        sampling = EquispacedLines(acceleration, center)
        batch = one_batch(MRIData("mni152_sample.h5", slices, SIZE, sampling, num_coils=NUM_COILS))
        y, operator, x = Reconstruction(CartesianMRI(SIZE), METHODS["TV"], SNRNoise(SNR)).measure(batch)
        assert y is not None and x is not None
        setting = f"R = {acceleration}"
        if not rows:
            print(f"{len(batch)} slices of {batch.patient[0]}, {SIZE} x {SIZE} pixels, {NUM_COILS} coils, {SNR:g} dB")
        columns = {"acceleration": acceleration}
        images, rows[setting] = reconstruct(METHODS, y, operator, x, MirroredPrior(prior), batch, setting, columns)
        for b, case in enumerate(batch.id):
            scale = batch.scale[b]
            shown = {name: as_array(scale * magnitude(image[b])) for name, image in images.items()}
            reference = as_array(scale * magnitude(x[b]))
            windows, intensity = view(Part(case, {"reference": reference}, {"scale": scale}), MAGNITUDE)
            title = f"{case.rsplit('/', 1)[0]}, slice {batch.index[b]}, {setting}"
            figure = output / "figures" / f"{case.replace('/', '_')}_R{acceleration}.png"
            case_figure(
                figure,
                shown,
                reference=reference,
                phase=phase(images["Patch diffusion"][b]),
                title=title,
                subtitle=f"{NUM_COILS} coils, {SNR:g} dB",
                voxel_mm=batch.voxel_mm[b],
                windows=windows,
                intensity=intensity,
            )
            figures.append(Figure(figure, f"{title}; the phase is that of patch diffusion"))
            if b == len(batch) // 2 and windows:
                pngs = {name: image_png(image, windows[0]) for name, image in shown.items()}
                comparisons.append(Comparison(pngs, title))
    facts = {
        "data": "MNI152 T1 template: the average brain of 152 people, skull and face removed (ICBM 2009a, McGill)",
        "simulated": f"smooth phases, {NUM_COILS} coils (their maps are known), complex noise at {SNR:g} dB",
        "operator": f"Cartesian, {SIZE} x {SIZE}, equispaced columns and a fully sampled centre of 8 % (R = 4) or 4 %",
        "prior": f"{card.kind}, {card.training.get('num_parameters', 0):,} parameters, {len(card.data)} volumes",
        "weights (SHA-256)": file_hash(path),
        "methods": "zero-filled; total variation, run to its optimum; l1 of wavelet details; patch diffusion",
    }
    notes = (
        "PSNR and SSIM are those of magnitudes, with the largest value of the slice's reference as their data range.",
        "An average of 152 brains is smoother than a scan, its background is empty, the coils' maps are known, and "
        "k-space is simulated on the grid of the reconstruction (an inverse crime): real scans are harder.",
        RESIDUAL,
    )
    return write_results(
        output,
        rows,
        "acceleration",
        facts,
        figures=figures,
        comparisons=comparisons,
        title="From an eighth of k-space",
        subtitle="A brain reconstructed zero-filled, by total variation, by wavelets and by a patch diffusion prior",
        command="make demo-mri",
        notes=notes,
    )


def main(args: list[str] | None = None) -> None:
    """Parses the few options and runs."""
    defaults = {"description": __doc__, "output": "outputs/demo-mri", "prior": "patch_mri_fine", "slices": "1:8:3"}
    command_line(args, run, ("psnr", "ssim", "relative_residual", "seconds"), **defaults)


if __name__ == "__main__":
    main()
