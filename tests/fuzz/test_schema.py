"""What schemathesis makes of the OpenAPI document, good and bad: every answer is one that the document promises."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.generation import GenerationMode

from tests.fuzz.bodies import bounded
from tests.fuzz.size import SEED, numbers
from tests.fuzz.victim import Victim

# Requests of a route with a body and of one without: in the short form, and as a share of the long one.
BODIES, PLAIN = (20, 0.045), (5, 0.0025)
PROMISES = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
DOCUMENTED = {503, 504}


@pytest.mark.timeout(3600)
def test_every_answer_is_one_that_the_document_promises(target: Victim) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{target.url}/openapi.json").json())
    for found in schema.get_all_operations():
        operation = found.ok()
        num_short, share = BODIES if operation.body else PLAIN
        torment(target, operation, len(numbers(num_short, share)))
        target.check_answers()
    target.check_unharmed()


def torment(target: Victim, operation: schemathesis.APIOperation, num_requests: int) -> None:
    cases = [operation.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]

    @seed(SEED)
    @settings(
        max_examples=num_requests,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(*cases))
    def ask(case: schemathesis.Case) -> None:
        case.body = short(case.body, operation.path)
        response = case.call(base_url=target.url, timeout=30)
        target.note(response.status_code, response.elapsed, f"{operation.label} {str(case.body)[:200]}")
        assert response.status_code < 500 or response.status_code in DOCUMENTED, response.text
        if "event-stream" not in str(response.headers.get("content-type")):
            case.validate_response(response, checks=PROMISES)

    ask()


def short(body: Any, path: str) -> Any:
    """Asks for no long answer."""
    if not isinstance(body, dict) or "completions" not in path:
        return body
    names = ("n", "max_tokens", "max_completion_tokens")
    limits = {name: bounded(name, value) for name in names if (value := body.get(name)) is not None}
    return {**body, **limits} if limits.keys() - {"n"} else {**body, **limits, "max_tokens": 4}
