"""One definition of every figure that an evaluation writes: what it is, in what unit, and which way is better.

SCR and TPP (Karvonen et al. 2025, "SAEBench", 2503.09532) are left out: an audit of how far such scores can be trusted
(Chanin 2026, 2605.18229) found both unfit at the settings that everybody uses. TPP ranks SAEs lower the longer they
train, and SCR at a large top-n falls as agreement with a known truth rises.
"""

from dataclasses import dataclass

__all__ = ["DEFINITIONS", "LEFT_OUT", "PARTS", "Definition"]

LEFT_OUT = (
    "SCR and TPP are left out: the reliability audit of Chanin (2026, arXiv 2605.18229) found them unfit at canonical "
    "settings. TPP ranks SAEs lower the longer they train; SCR turns against the known truth at large top-n."
)

PARTS = {
    "core": "Sparsity, reconstruction and the model's loss",
    "geometry": "The decoder's geometry",
    "seeds": "Agreement between seeds",
    "dark_matter": "Dark matter: what of the error is linear in the activation",
    "description_length": "Description length",
    "labels": "Ground truth: labels of the small world",
    "planted": "Ground truth: planted atoms",
}
"""Name of a part of the evaluation → its heading."""


@dataclass(frozen=True)
class Definition:
    """What a figure is.

    Attributes:
        figure: its name in tables.
        part: the part of the evaluation that it belongs to.
        title: its name on a page.
        meaning: one sentence.
        unit: of the number; "" for a share, a cosine or another pure number.
        better: "lower", "higher", or "" where neither is.
        digits: digits after the point, on a page.
    """

    figure: str
    part: str
    title: str
    meaning: str
    unit: str = ""
    better: str = ""
    digits: int = 4


_NATS, _BITS, _WEIGHTS = "nats per token", "bits per token", " It is of the weights alone."

_CORE = (
    ("l0", "L0", "Mean number of positive latents per token, special tokens left out.", "", "", 2),
    ("l0_with_special", "L0 with special tokens", "The same with special tokens counted too.", "", "", 2),
    ("fvu", "FVU", "Σ‖x − x̂‖² / Σ‖x − x̄‖², each summed over all tokens before dividing.", "", "lower", 4),
    ("explained_variance", "Explained variance", "1 − FVU.", "", "higher", 4),
    ("ce_clean", "CE, clean", "The model's own loss.", _NATS, "", 4),
    ("ce_sae", "CE, reconstruction", "Loss with the reconstruction in the activation's place.", _NATS, "lower", 4),
    ("ce_zero", "CE, zeros", "Loss with zeros in the activation's place, at the tokens that count.", _NATS, "", 4),
    ("ce_mean", "CE, mean", "Loss with the mean activation in its place, at the tokens that count.", _NATS, "", 4),
    (
        "ce_recovered",
        "CE recovered",
        "(CE of zeros − CE of the reconstruction) / (CE of zeros − CE clean).",
        "",
        "higher",
        4,
    ),
    (
        "ce_recovered_mean",
        "CE recovered, mean ablation",
        "(CE of the mean − CE of the reconstruction) / (CE of the mean − CE clean).",
        "",
        "higher",
        4,
    ),
    (
        "ce_loss_score",
        "ce_loss_score",
        "SAELens' figure of that name: CE recovered against zeros at every token, special ones included.",
        "",
        "higher",
        4,
    ),
    ("kl", "KL", "KL(clean ‖ with the reconstruction), mean over predictions.", _NATS, "lower", 4),
    (
        "kl_recovered",
        "KL recovered",
        "1 − KL with the reconstruction / KL with zeros, both from the clean output.",
        "",
        "higher",
        4,
    ),
    (
        "kl_recovered_mean",
        "KL recovered, mean ablation",
        "1 − KL with the reconstruction / KL with the mean, both from the clean output.",
        "",
        "higher",
        4,
    ),
    ("dead", "Dead", "Share of latents never positive on these tokens; it falls as text is added.", "", "lower", 4),
    ("dense", "Dense", "Share of latents that are positive on more than a tenth of the tokens.", "", "", 4),
    (
        "density_median",
        "Median density",
        "Median over latents that fire of the share of tokens on which they do.",
        "",
        "",
        5,
    ),
    ("pca_rank", "PCA: rank", "Components of the PCA that is measured beside, fitted on other text.", "", "", 0),
    ("pca_fvu", "PCA: FVU", "FVU of that PCA on the same tokens.", "", "", 4),
    ("pca_ce", "PCA: CE", "Loss with that PCA's reconstruction in the activation's place.", _NATS, "", 4),
    ("pca_ce_recovered", "PCA: CE recovered", "CE recovered by that PCA.", "", "", 4),
)

_GEOMETRY = (
    (
        "effective_rank",
        "Effective rank",
        "exp of the entropy of the decoder's singular values σ / Σσ, rows at norm 1.",
        2,
    ),
    ("participation", "Participation ratio", "(Σσ²)² / Σσ⁴ of the same singular values.", 2),
    (
        "nearest_cosine",
        "Nearest neighbour",
        "Mean over latents of the largest cosine of their decoder row with another.",
        4,
    ),
    (
        "encoder_cosine",
        "Encoder and decoder",
        "Mean over latents of the cosine of encoder column and decoder row.",
        4,
    ),
    ("zero_rows", "Rows of norm 0", "Decoder rows that are the zero vector.", 0),
)

_SEEDS = (
    (
        "mmcs_seeds",
        "MMCS",
        "Mean over latents of the largest cosine with a latent of another seed, mean over the other seeds.",
    ),
    (
        "matched_cosine_seeds",
        "Matched cosine",
        "Mean cosine of latents matched one to one (Hungarian) with another seed's, mean over the other seeds.",
    ),
    (
        "uniqueness_seeds",
        "Uniqueness",
        "Distinct latents of another seed that are nearest to some latent, per latent, mean over the other seeds.",
    ),
)

_DARK = (
    ("fvu_nonlinear", "FVU not linear in x", "Σ‖e − ê‖² / Σ‖x − x̄‖², with ê the error's best linear prediction.", ""),
    ("linear_share", "Linear share", "Share of the squared error that is linear in the activation.", ""),
    ("error_r2", "R² of the error", "Mean over dimensions of the R² of e − ē as a linear function of x.", ""),
    ("error_r2_pooled", "R² of the error, pooled", "The same, dimensions summed before dividing.", ""),
    ("error_norm_r2", "R² of the error's norm", "R² of ‖e‖² as a linear function of x.", ""),
)

_LENGTH = (
    (
        "bits",
        "Description length",
        "Σ over latents of H(fires) + p(fires) · H(value | fires), coded independently.",
        "lower",
    ),
    ("bits_firing", "… which fire", "The part of it that says which latents fire.", ""),
    ("bits_values", "… their values", "The part of it that says their values.", ""),
    ("bits_joint", "Coded as a set", "L0 · bits of a value + log2 C(d_sae, L0): no statistics of latents used.", ""),
    ("bits_undersampling", "Too low by", "About how much too low it is for want of tokens (Miller-Madow).", ""),
    ("bits_dense", "Dense", "Bits of the raw dimensions at the error that writing values down may cost.", ""),
    ("bits_dense_matched", "Dense, same error", "Bits of the raw dimensions at the dictionary's own total error.", ""),
    ("bits_one_hot", "One-hot", "Bits if every token were an atom of its own, which is named and written down.", ""),
)

_FOUND = "Values that are found where F1 ≥ 0.8"
_ANY = "The same by any of the dictionaries, chosen alike"
_LABELS = (
    (
        "labels_tested",
        "Values tested",
        "Values of labels, and pairs of a role with another label, with 30 tokens or more in each half.",
        "",
        0,
    ),
    (
        "labels_found",
        "Values found",
        "Label values that a latent and a level of it, chosen on other rows, find with F1 ≥ 0.8, well above chance.",
        "higher",
        0,
    ),
    ("labels_found_single", "… of one label", "Those of them that are no pair of two labels.", "higher", 0),
    (
        "labels_found_in_context",
        "… in context",
        "Those of them that no set of tokens finds: the token alone does not tell.",
        "higher",
        0,
    ),
    (
        "labels_found_positive",
        "… at any activation",
        "Those of them that are found by where the latent is positive, without a level.",
        "higher",
        0,
    ),
    ("labelled_latents", "Latents that find one", "Distinct latents among those that find a value.", "higher", 0),
    ("label_f1", "Mean F1", "Mean over values of the F1 of their latent, on rows it was not chosen on.", "higher", 4),
    ("labels_found_shuffled", "Control: other labels", f"{_FOUND} for the labels of other rows.", "", 0),
    ("labels_found_random", "Control: random", f"{_FOUND} by as many random directions, as often firing.", "", 0),
    ("labels_found_pca", "Control: PCA", f"{_FOUND} by as many principal directions, as often firing.", "", 0),
    ("labels_found_tokens", "Control: tokens", f"{_FOUND} by the best set of tokens, without context.", "", 0),
    (
        "labels_found_by_any",
        "Values found by any dictionary",
        "Values that a latent of some dictionary, both chosen on other rows, finds with F1 ≥ 0.8, well above chance.",
        "higher",
        0,
    ),
    (
        "labels_found_by_any_in_context",
        "… by any, in context",
        "Those of them that no set of tokens finds: the token alone does not tell.",
        "higher",
        0,
    ),
    ("labels_found_by_any_shuffled", "Control of any: other labels", f"{_ANY}, for the labels of other rows.", "", 0),
    ("labels_found_by_any_random", "Control of any: random", f"{_ANY}, as random directions.", "", 0),
    ("labels_found_by_any_pca", "Control of any: PCA", f"{_ANY}, as principal directions.", "", 0),
    ("labels_found_by_any_tokens", "Control of any: tokens", f"{_FOUND} by the best set of tokens.", "", 0),
)

_PLANTED = (
    ("mmcs", "MMCS", "Mean over latents of the largest |cos| with an atom.", "higher", 4),
    ("coverage", "Coverage", "Mean over atoms of the largest |cos| with a latent.", "higher", 4),
    ("mcc", "MCC", "Mean |cos| of atoms and latents matched one to one.", "higher", 4),
    ("uniqueness", "Uniqueness", "Distinct nearest atoms, per latent.", "higher", 4),
    ("precision", "Precision", "Mean over latents: share of their tokens that have their nearest atom.", "higher", 4),
    (
        "recall",
        "Recall",
        "Mean over latents: share of the tokens with their nearest atom where they fire.",
        "higher",
        4,
    ),
    ("f1", "F1", "Mean over latents of the harmonic mean of the two.", "higher", 4),
    ("atom_f1", "F1 by atom", "Mean over matched atoms of F1 with their latent.", "higher", 4),
    ("shrinkage", "Shrinkage", "Magnitude of latents over the atoms' true one; 1 is right.", "", 4),
    ("norm_ratio", "Norm ratio", "Mean of ‖x̂‖ / ‖x‖ over tokens.", "", 4),
    ("explained_variance", "Explained variance", "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖².", "higher", 4),
    ("dead", "Dead", "Latents that never fired.", "lower", 0),
    ("l0", "L0", "Mean number of latents that fire.", "", 2),
    ("true_l0", "True L0", "Mean number of atoms that are on.", "", 2),
)


def _all() -> dict[str, Definition]:
    found = [
        *(Definition(name, "core", title, text, unit, way, n) for name, title, text, unit, way, n in _CORE),
        *(Definition(name, "geometry", title, text + _WEIGHTS, digits=n) for name, title, text, n in _GEOMETRY),
        *(Definition(name, "seeds", title, text + _WEIGHTS, better="higher") for name, title, text in _SEEDS),
        *(Definition(name, "dark_matter", title, text, better=way) for name, title, text, way in _DARK),
        *(Definition(name, "description_length", title, text, _BITS, way, 2) for name, title, text, way in _LENGTH),
        *(Definition(name, "labels", title, text, "", way, n) for name, title, text, way, n in _LABELS),
        *(Definition(f"planted_{name}", "planted", title, text, "", way, n) for name, title, text, way, n in _PLANTED),
    ]
    return {one.figure: one for one in found}


DEFINITIONS = _all()
"""Name of a figure → its definition, in the order of tables."""
