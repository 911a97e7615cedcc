# docker build -f docker/service.Dockerfile [--build-arg RUNTIME=gpu] -t factorlens-service .
FROM python:3.11-slim-bookworm AS build
# cpu | gpu: which onnxruntime; the two exclude each other.
ARG RUNTIME=cpu
WORKDIR /source
RUN python -m venv --without-pip /opt/factorlens
# Dependencies first, in a layer of their own: a change of the code does not fetch them again.
# Nothing is installed whose hash is not in the lock; setuptools, to build our own package with, does not stay.
COPY docker/requirements.${RUNTIME}.lock requirements.lock
RUN pip --python /opt/factorlens install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY bundle bundle
COPY service service
RUN pip --python /opt/factorlens install --no-cache-dir --no-deps --no-build-isolation . \
    && pip --python /opt/factorlens uninstall --yes setuptools
# A volume that is mounted on it, and is new, takes its owner and mode.
RUN install -d -m 700 /var/lib/factorlens/state

FROM python:3.11-slim-bookworm
COPY --from=build /opt/factorlens /opt/factorlens
COPY --from=build --chown=10001:10001 /var/lib/factorlens /var/lib/factorlens
ENV PATH=/opt/factorlens/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FACTORLENS_BUNDLES=/bundles \
    FACTORLENS_HOST=0.0.0.0 \
    FACTORLENS_PORT=8000
# Numbers, so that an orchestrator can tell without the image's passwd that this is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready, not merely alive: healthy is to mean "answers predictions", and Docker does not restart on it.
# http.client rather than urllib: an HTTP_PROXY handed to the container must not catch this request.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys;\
service = http.client.HTTPConnection('127.0.0.1', int(os.environ['FACTORLENS_PORT']), timeout=4);\
service.request('GET', '/readyz');\
sys.exit(service.getresponse().status != 200)"]
CMD ["python", "-m", "service"]
