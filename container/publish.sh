#!/bin/bash
# Build both images, describe what is in them, push them. Prints the image names that config/<env>.yaml wants.
#
# Reads: JOB_REPOSITORY and SERVE_REPOSITORY (ECR repository URIs), JOB_BASE and SERVE_BASE (base images),
#        SBOM_URI (s3://bucket/prefix), AWS_REGION, IMAGE_TAG (optional), SERVE_ENGINE (optional: vllm).
set -euo pipefail

engine="${SERVE_ENGINE:-native}"

# Tags are immutable, so a tag stands for its content: the same sources always get the same one.
sources() {
    find pyproject.toml constraints.txt container kernels steps -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z \
        | xargs -0 sha256sum
    echo "$JOB_BASE $SERVE_BASE $engine"
}
tag="${IMAGE_TAG:-$(sources | sha256sum | cut -c1-16)}"

registry="${JOB_REPOSITORY%%/*}"
aws ecr get-login-password --region "$AWS_REGION" | docker login --username AWS --password-stdin "$registry"

publish() {
    local target="$1" repository="$2" image="$2:$tag"
    if aws ecr describe-images --region "$AWS_REGION" --repository-name "${repository#*/}" --image-ids "imageTag=$tag" \
        > /dev/null 2>&1; then
        echo "publish: $image is there already"
        return
    fi
    docker build --file container/Dockerfile --target "$target" --tag "$image" \
        --build-arg "JOB_BASE=$JOB_BASE" --build-arg "SERVE_BASE=$SERVE_BASE" --build-arg "ENGINE=$engine" \
        --build-arg "REVISION=${CODEBUILD_RESOLVED_SOURCE_VERSION:-$tag}" .
    mkdir -p "sbom/$target"
    docker run --rm "$image" python3 -m pip list --format=freeze > "sbom/$target/python.txt"
    docker run --rm "$image" dpkg-query --show > "sbom/$target/debian.txt"
    cyclonedx-py requirements --output-file "sbom/$target/python.cdx.json" "sbom/$target/python.txt"
    aws s3 cp --region "$AWS_REGION" --recursive "sbom/$target" "$SBOM_URI/$target/$tag/"
    docker push "$image"
}

publish job "$JOB_REPOSITORY"
publish serve "$SERVE_REPOSITORY"
printf 'images:\n  job: %s:%s\n  serve: %s:%s\n' "$JOB_REPOSITORY" "$tag" "$SERVE_REPOSITORY" "$tag"
