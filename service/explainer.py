"""explain: rows in, named contributions out."""

from service.messages import ExplainAnswer, ExplainRequest, Explanation, Instance
from service.runtime import Runtime
from service.settings import Settings


def explain(loaded: Runtime, request: ExplainRequest, settings: Settings) -> ExplainAnswer:
    encoded = loaded.encode(request, limit=settings.max_rows)
    loaded.count(encoded, "explain")
    explanations = loaded.explain(_rows(request), encoded, top_k=request.top_k or settings.top_k)
    return ExplainAnswer(
        model=loaded.manifest.name,
        version=loaded.manifest.version,
        digest=loaded.digest,
        explanations=[Explanation.model_validate(each.as_json()) for each in explanations],
    )


def _rows(request: ExplainRequest) -> list[Instance]:
    if request.instances is not None:
        return request.instances
    columns = request.columns or {}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
