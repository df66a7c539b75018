"""iam:SimulatePrincipalPolicy, which moto lacks and the SageMaker SDK calls on every upsert.

It evaluates the policies that the role really has in moto (inline and managed), by moto's own policy engine;
conditions and permission boundaries are not looked at.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

from pipelines.sandbox.api import Account
from pipelines.sandbox.errors import ServiceError

_RESULT = (
    "<member><EvalActionName>{action}</EvalActionName><EvalResourceName>{resource}</EvalResourceName>"
    "<EvalDecision>{decision}</EvalDecision><MatchedStatements/><MissingContextValues/></member>"
)
_ANSWER = (
    '<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
    "<SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated><EvaluationResults>{results}</EvaluationResults>"
    "</SimulatePrincipalPolicyResult><ResponseMetadata><RequestId>sandbox</RequestId></ResponseMetadata>"
    "</SimulatePrincipalPolicyResponse>"
)


def simulate(account: Account, form: dict[str, list[str]]) -> str:
    """The XML answer to a SimulatePrincipalPolicy request given as a parsed form body.

    Raises:
        ServiceError: NoSuchEntity (404): the role does not exist.
    """
    arn = form["PolicySourceArn"][0]
    actions = [v[0] for k, v in form.items() if k.startswith("ActionNames.member.")]
    resources = [v[0] for k, v in form.items() if k.startswith("ResourceArns.member.")] or ["*"]
    policies = _policies(account, arn)
    results = [
        _RESULT.format(action=escape(a), resource=escape(r), decision=_decide(policies, a, r))
        for a in actions
        for r in resources
    ]
    return _ANSWER.format(results="".join(results))


def _policies(account: Account, arn: str) -> list[Any]:
    from moto.iam import iam_backends
    from moto.iam.access_control import IAMPolicy

    roles = iam_backends[account.account_id]["aws"].roles.values()
    role = next((r for r in roles if r.arn == arn), None)
    if role is None:
        raise ServiceError("NoSuchEntity", f"The role {arn} cannot be found.", 404)
    inline = [unquote(p) if isinstance(p, str) else p for p in role.policies.values()]
    return [IAMPolicy(p) for p in (*inline, *role.managed_policies.values())]


def _decide(policies: list[Any], action: str, resource: str) -> str:
    answers = {p.is_action_permitted(action, resource).name for p in policies}
    if "DENIED" in answers:
        return "explicitDeny"
    return "allowed" if "PERMITTED" in answers else "implicitDeny"
