"""Every model against a loop written from its paper, in plain Python; and the models that are cases of others."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from models import MODELS, Layout, Model
from models.ensemble import Member

LAYOUT = Layout(num_features=30, widths=(1, 3, 1, 2), needs_values=True)
K = 5
NFM_OPTIONS = {"embedding_dim": K, "layers": [4, 3]}
AFM_MEMBER = Member(key="afm", options={"embedding_dim": K, "attention_dim": 4})

Vector = list[float]
Row = list[list[tuple[int, float]]]  # the features i of every field, with their values x_i
Parameters = dict[str, Any]
Terms = tuple[float, Vector, Vector, float]  # bias, fields, pairs, residual

# A plain category, a weighted list of up to three values, a scaled number, a list with combiner mean.
ROWS: list[Row] = [
    [[(3, 1.0)], [(7, 0.5), (8, 2.0), (9, 1.0)], [(20, -1.7)], [(23, 0.5), (25, 0.5)]],
    [[(4, 1.0)], [(8, 0.25)], [(20, 0.4)], [(24, 1.0)]],
    [[(1, 1.0)], [], [(20, 0.0)], [(22, 0.5), (22, 0.5)]],
]


def lr(row: Row, of: Parameters) -> Terms:
    return of["bias"], first_order(row, of), [0.0] * 6, 0.0


def fm(row: Row, of: Parameters) -> Terms:
    e = field_vectors(row, of)
    return of["bias"], first_order(row, of), [dot(e[f], e[g]) for f, g in LAYOUT.pairs], 0.0


def nfm(row: Row, of: Parameters) -> Terms:
    z = [sum(product[k] for product in pair_products(row, of)) for k in range(K)]
    for layer in ("mlp.0", "mlp.3"):
        z = [max(0.0, value) for value in linear(of, layer, z)]
    return of["bias"], first_order(row, of), [0.0] * 6, dot(z, column(of["h"]))


def nfm_batch_norm(row: Row, of: Parameters) -> Terms:
    z = [sum(product[k] for product in pair_products(row, of)) for k in range(K)]
    z = batch_norm(of, "pooling.0", z)
    z = batch_norm(of, "mlp.1", [dot(weights, z) for weights in of["mlp.0.weight"]])
    return of["bias"], first_order(row, of), [0.0] * 6, dot([math.tanh(v) for v in z], column(of["h"]))


def fwnfm(row: Row, of: Parameters) -> Terms:
    weighted = zip(of["r"], pair_products(row, of), strict=True)
    z = [sum(parts) for parts in zip(*([r * x for x in product] for r, product in weighted), strict=True)]
    z = [max(0.0, value) for value in linear(of, "mlp.0", z)]
    return of["bias"], first_order(row, of), [0.0] * 6, dot(z, column(of["h"]))


def ensemble(row: Row, of: Parameters) -> Terms:
    members = [inside(of, f"members.{m}.") for m in range(9) if f"members.{m}.bias" in of]
    found = [afm(row, member) if "attention.W" in member else nfm(row, member) for member in members]
    biases, fields, pairs, residuals = zip(*found, strict=True)
    mean = [[sum(parts) / len(found) for parts in zip(*terms, strict=True)] for terms in (fields, pairs)]
    return sum(biases) / len(found), mean[0], mean[1], sum(residuals) / len(found)


def crossfit(row: Row, of: Parameters) -> Terms:
    bias, fields, pairs, residual = ensemble(row, of)
    for m, (formula, kind) in enumerate([(afm, 0), (nfm, 1), (nfm, 1)]):
        member, meta = inside(of, f"members.{m}."), inside(of, f"meta.{kind}.")
        found = formula(row, member)
        logit = found[0] + sum(found[1]) + sum(found[2]) + found[3]
        vectors = field_vectors(row, member)
        lengths = [math.sqrt(dot(e, e)) + 0.01 for e in vectors]
        units = [[value / length for value in e] for e, length in zip(vectors, lengths, strict=True)]
        cosines = [dot(e, other) for e, other in itertools.combinations(units, 2)]
        clues = [logit, *first_order(row, member), *map(math.log, lengths), *cosines]
        z = batch_norm(meta, "norm", clues)
        for layer in ("mlp.0", "mlp.3"):
            z = [max(0.0, value) for value in linear(meta, layer, z)]
        residual += dot(z, column(meta["h"])) / 3
    return bias, fields, pairs, residual


def inside(of: Parameters, prefix: str) -> Parameters:
    return {name.removeprefix(prefix): value for name, value in of.items() if name.startswith(prefix)}


def afm(row: Row, of: Parameters) -> Terms:
    products = pair_products(row, of)
    attention = softmax(attention_logits(products, of))
    pairs = [a * dot(column(of["p"]), v) for a, v in zip(attention, products, strict=True)]
    return of["bias"], first_order(row, of), pairs, 0.0


def attention_logits(products: list[Vector], of: Parameters) -> Vector:
    logits = []
    for product in products:
        logit = 0.0
        for a, b in enumerate(of["attention.b"]):
            logit += of["attention.h"][a][0] * max(0.0, dot([w[a] for w in of["attention.W"]], product) + b)
        logits.append(logit)
    return logits


def ifm(row: Row, of: Parameters) -> Terms:
    e = field_vectors(row, of)
    u = [max(0.0, value) for value in linear(of, "fen.mlp.0", [value for vector in e for value in vector])]
    m = [4 * share for share in softmax([dot(u, [p[f] for p in of["fen.P"]]) for f in range(4)])]
    fields = [m[f] * term for f, term in enumerate(first_order(row, of))]
    return of["bias"], fields, [m[f] * m[g] * dot(e[f], e[g]) for f, g in LAYOUT.pairs], 0.0


def interaction_fm(row: Row, of: Parameters) -> Terms:
    pairs = [sum(vector) for vector in interactions(row, of, temperature=2.0)]
    return of["bias"], first_order(row, of), pairs, 0.0


def inn(row: Row, of: Parameters) -> Terms:
    z = [value for vector in interactions(row, of, temperature=2.0) for value in vector]
    return of["bias"], first_order(row, of), [0.0] * 6, network(of, z)


def inn_batch_norm(row: Row, of: Parameters) -> Terms:
    z = [value for vector in interactions(row, of, temperature=10.0) for value in vector]
    z = batch_norm(of, "network.mlp.1", [dot(weights, z) for weights in of["network.mlp.0.weight"]])
    return of["bias"], first_order(row, of), [0.0] * 6, dot([max(0.0, v) for v in z], column(of["network.h"]))


def deep_ifm(row: Row, of: Parameters) -> Terms:
    residual = network(of, [value for vector in field_vectors(row, of) for value in vector])
    return *interaction_fm(row, of)[:3], residual


def interactions(row: Row, of: Parameters, *, temperature: float) -> list[Vector]:
    """P T_ij F_ij ⊙ (e_i ⊙ e_j) for every pair; the aspects a model has are told by its parameters."""
    products = pair_products(row, of)
    attention, importance = [1 / 6] * 6, [[1.0] * K] * 6
    if "attention.W" in of:
        attention = softmax([score / temperature for score in attention_logits(products, of)])
    if "U" in of:
        importance = [
            [sum(u * v * d[k] for u, v, d in zip(of["U"][f], of["U"][g], of["D"], strict=True)) for k in range(K)]
            for f, g in LAYOUT.pairs
        ]
    if "importance" in of:
        importance = of["importance"]
    return [
        [6 * t * a * b for a, b in zip(f, e, strict=True)]
        for t, f, e in zip(attention, importance, products, strict=True)
    ]


def network(of: Parameters, z: Vector) -> float:
    for layer in ("network.mlp.0", "network.mlp.3"):
        z = [max(0.0, value) for value in linear(of, layer, z)]
    return dot(z, column(of["network.h"]))


def first_order(row: Row, of: Parameters) -> Vector:
    return [sum(x * of["weight"][i][0] for i, x in field) for field in row]


def field_vectors(row: Row, of: Parameters) -> list[Vector]:
    return [[sum(x * of["embedding"][i][k] for i, x in field) for k in range(K)] for field in row]


def pair_products(row: Row, of: Parameters) -> list[Vector]:
    e = field_vectors(row, of)
    return [[a * b for a, b in zip(e[f], e[g], strict=True)] for f, g in LAYOUT.pairs]


def dot(left: Vector, right: Vector) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def column(matrix: list[Vector]) -> Vector:
    return [value for (value,) in matrix]


def linear(of: Parameters, layer: str, z: Vector) -> Vector:
    rows = zip(of[f"{layer}.weight"], of[f"{layer}.bias"], strict=True)
    return [dot(weights, z) + bias for weights, bias in rows]


def batch_norm(of: Parameters, layer: str, z: Vector) -> Vector:
    names = ("running_mean", "running_var", "weight", "bias")
    rows = zip(z, *(of[f"{layer}.{name}"] for name in names), strict=True)
    return [(value - mean) / math.sqrt(var + 1e-5) * weight + bias for value, mean, var, weight, bias in rows]


def softmax(scores: Vector) -> Vector:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


ASPECTS: list[dict[str, Any]] = [
    {},
    {"factorised": False},
    {"aspects": "feature"},
    {"aspects": "field"},
    {"aspects": "field", "factorised": False},
]


@pytest.mark.parametrize(
    ("key", "options", "formula"),
    [
        ("lr", {}, lr),
        ("fm", {"embedding_dim": K}, fm),
        ("nfm", {"embedding_dim": K, "layers": (4, 3)}, nfm),
        ("nfm", {"embedding_dim": K, "layers": (4,), "activation": "tanh", "batch_norm": True}, nfm_batch_norm),
        ("fwnfm", {"embedding_dim": K, "layers": (4,)}, fwnfm),
        ("afm", {"embedding_dim": K, "attention_dim": 4}, afm),
        ("ensemble", {"members": (AFM_MEMBER, Member(key="nfm", copies=2, options=NFM_OPTIONS))}, ensemble),
        (
            "crossfit",
            {
                "members": (AFM_MEMBER, Member(key="nfm", copies=2, options=NFM_OPTIONS)),
                "meta_layers": (6, 3),
            },
            crossfit,
        ),
        ("ifm", {"embedding_dim": K, "fen_layers": (6,)}, ifm),
        *[
            (key, {"embedding_dim": K, "field_dim": 3, "temperature": 2.0, **aspects, **layers}, formula)
            for aspects in ASPECTS
            for key, layers, formula in [
                ("interaction_fm", {}, interaction_fm),
                ("inn", {"layers": (4, 3)}, inn),
                ("deep_ifm", {"layers": (4, 3)}, deep_ifm),
            ]
        ],
        ("inn", {"embedding_dim": K, "layers": (4,), "batch_norm": True}, inn_batch_norm),
    ],
)
@torch.no_grad()
def test_the_model_is_its_paper(key: str, options: dict[str, Any], formula: Any) -> None:
    model = build(key, **options)
    of = {name: value.tolist() for name, value in model.state_dict().items()}
    ids_BS, values_BS = encoded()
    logits, explained = model(ids_BS, values_BS).tolist(), model.explain(ids_BS, values_BS).terms
    for number, row in enumerate(ROWS):
        bias, fields, pairs, residual = formula(row, of)
        assert logits[number] == pytest.approx(bias + sum(fields) + sum(pairs) + residual, abs=1e-12)
        assert explained.bias.item() == pytest.approx(bias, abs=1e-12)
        assert explained.field[number].tolist() == pytest.approx(fields, abs=1e-12)
        assert explained.pair[number].tolist() == pytest.approx(pairs, abs=1e-12)
        assert explained.residual[number].item() == pytest.approx(residual, abs=1e-12)


@torch.no_grad()
def test_nfm_without_layers_is_fm() -> None:
    fm_model, nfm_model = build("fm"), build("nfm", layers=())
    nfm_model.load_state_dict(fm_model.state_dict())
    torch.testing.assert_close(nfm_model(*encoded()), fm_model(*encoded()))
    nfm_terms, fm_terms = (model.explain(*encoded()).terms for model in (nfm_model, fm_model))
    torch.testing.assert_close(nfm_terms.pair, fm_terms.pair)
    assert nfm_model.exact


@torch.no_grad()
def test_afm_with_equal_attention_is_fm_over_the_number_of_pairs() -> None:
    fm_model, afm_model = build("fm"), build("afm")
    afm_model.load_state_dict(fm_model.state_dict(), strict=False)
    nn.init.zeros_(afm_model.attention.h)
    nn.init.constant_(afm_model.p, 3.0)
    afm_terms, fm_terms = (model.explain(*encoded()).terms for model in (afm_model, fm_model))
    torch.testing.assert_close(afm_terms.pair, fm_terms.pair * 3 / 6)


@torch.no_grad()
def test_ifm_with_all_factors_one_is_fm() -> None:
    fm_model, ifm_model = build("fm"), build("ifm")
    ifm_model.load_state_dict(fm_model.state_dict(), strict=False)
    nn.init.zeros_(ifm_model.fen.P)
    torch.testing.assert_close(ifm_model(*encoded()), fm_model(*encoded()))


@torch.no_grad()
def test_untrained_afm_is_nearly_fm() -> None:
    fm_model = build("fm")
    afm_model = MODELS["afm"](LAYOUT, MODELS["afm"].Config(embedding_dim=K)).double().eval()
    nn.init.normal_(fm_model.embedding, std=0.01)
    afm_model.load_state_dict(fm_model.state_dict(), strict=False)
    pairs_BP = fm_model.explain(*encoded()).terms.pair
    difference_B = (afm_model(*encoded()) - fm_model(*encoded())).abs()
    assert torch.all(difference_B < 0.01 * pairs_BP.abs().sum(1))


def build(key: str, **options: Any) -> Model:
    torch.manual_seed(11)
    if hasattr(MODELS[key].Config, "embedding_dim"):
        options = {"embedding_dim": K, **options}
    model = MODELS[key](LAYOUT, MODELS[key].Config(**options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def encoded() -> tuple[torch.Tensor, torch.Tensor]:
    """ROWS in slots: the features of a field from its left, then padding."""
    padded = [
        [slot for field, width in zip(row, LAYOUT.widths, strict=True) for slot in pad(field, width)] for row in ROWS
    ]
    ids_BS = torch.tensor([[i for i, _ in row] for row in padded])
    return ids_BS, torch.tensor([[x for _, x in row] for row in padded], dtype=torch.float64)


def pad(field: list[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    return field + [(0, 0.0)] * (width - len(field))


def test_one_large_value_costs_fm_no_digits() -> None:
    """½[(Σe)² − Σe²] would lose them all: a served FM sums without squares."""
    torch.manual_seed(3)
    layout = Layout(num_features=9, widths=(1, 1, 1), needs_values=True)
    model = MODELS["fm"](layout, MODELS["fm"].Config(embedding_dim=8, init_std=0.5)).eval()
    ids, values = torch.tensor([[1, 4, 7]]), torch.tensor([[1e6, 1.0, 1.0]])
    terms = model.explain(ids, values).terms
    total = terms.bias + terms.field.sum() + terms.pair.sum()
    assert abs(model(ids, values) - total) <= 1e-6 * (1 + terms.field.abs().sum() + terms.pair.abs().sum())


def test_an_ensemble_in_training_gives_every_member_a_loss_of_its_own() -> None:
    model = build("ensemble", members=(AFM_MEMBER, Member(key="nfm", copies=2, options=NFM_OPTIONS)))
    logits_MB = model.train()(*encoded())
    assert logits_MB.shape == (3, len(ROWS))
    torch.testing.assert_close(logits_MB.mean(0), model.eval()(*encoded()))
    assert len({tuple(row) for row in logits_MB.tolist()}) == 3  # copies differ


def test_fwnfm_with_all_weights_one_is_nfm() -> None:
    weighted, plain = build("fwnfm", layers=(4,)), build("nfm", layers=(4,))
    plain.load_state_dict({name: tensor for name, tensor in weighted.state_dict().items() if name != "r"})
    with torch.no_grad():
        weighted.get_parameter("r").fill_(1.0)
    torch.testing.assert_close(weighted(*encoded()), plain(*encoded()))


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        ({"key": "nfm", "options": {"layer": (4,)}}, "unexpected keyword argument 'layer'"),
        ({"key": "neural_fm"}, "members.key: expected one of lr, fm"),
        ({"key": "ensemble"}, "key: expected a model that is no ensemble itself"),
        ({"key": "fm", "copies": 0}, "copies: expected a whole number of at least 1, got 0"),
    ],
)
def test_an_ensemble_names_the_member_it_refuses(member: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        build("ensemble", members=(Member(**member),))
