{{/* Start of the name of every object of the cluster; at most 40 characters, so that a suffix fits. */}}
{{- define "tessera.fullname" -}}
{{- if contains "tessera" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-tessera" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Namespace of every namespaced object. */}}
{{- define "tessera.namespace" -}}
{{- .Values.namespace.name | default .Release.Namespace -}}
{{- end -}}

{{/* Labels by which pods of a component are selected; they never change. Call with (list $ component). */}}
{{- define "tessera.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: tessera
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of every object. Call with (list $ component). */}}
{{- define "tessera.labels" -}}
{{- $root := index . 0 -}}
{{ include "tessera.selectorLabels" . }}
app.kubernetes.io/part-of: tessera
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Name, namespace and labels of a namespaced object. The name does not depend on the release, since `tessera submit` looks for it. Call with (list $ component suffix). */}}
{{- define "tessera.metadata" -}}
{{- $root := index . 0 -}}
name: tessera-{{ index . 2 }}
namespace: {{ include "tessera.namespace" $root }}
labels:
  {{- include "tessera.labels" (list $root (index . 1)) | nindent 2 }}
{{- end -}}

{{/* What the operator reads from `--settings`. */}}
{{- define "tessera.operatorSettings" -}}
{{- $repositories := dict -}}
{{- range $name, $given := .Values.operator.repositories -}}
{{- $known := omit $given "existingSecret" -}}
{{- if $given.existingSecret -}}
{{- $_ := set $known "credentials" (printf "/var/run/secrets/tessera/git/%s" $name) -}}
{{- end -}}
{{- $_ := set $repositories $name $known -}}
{{- end -}}
{{- $settings := dict "repositories" $repositories -}}
{{- if .Values.operator.signingSecret -}}
{{- $_ := set $settings "signing_key" "/var/run/secrets/tessera/signing/key.pem" -}}
{{- end -}}
{{- with .Values.operator.alertmanager -}}
{{- $_ := set $settings "alertmanager" . -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* A quantity as it is written: Helm reads numbers as floats, and would print 10000000 as 1e+07. */}}
{{- define "tessera.quantity" -}}
{{- kindIs "string" . | ternary . (. | int64 | toString) | quote -}}
{{- end -}}

{{/* An image of ours. Call with (list $ name). */}}
{{- define "tessera.image" -}}
{{- $root := index . 0 -}}
{{- printf "%s/%s:%s" $root.Values.images.prefix (index . 1) ($root.Values.images.tag | default $root.Chart.AppVersion) -}}
{{- end -}}

{{- define "tessera.imagePullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* URL of the S3 server; empty where it is one of a cloud. */}}
{{- define "tessera.s3Endpoint" -}}
{{- if .Values.embedded.s3.enabled -}}
http://tessera-s3.{{ include "tessera.namespace" . }}:8333
{{- else -}}
{{- .Values.store.endpoint -}}
{{- end -}}
{{- end -}}

{{/* Port at which Prometheus reads the metrics of stages. */}}
{{- define "tessera.metricsPort" -}}
9464
{{- end -}}

{{/* URL of MLflow; empty where there is none. */}}
{{- define "tessera.mlflowUri" -}}
{{- if .Values.embedded.mlflow.enabled -}}
http://tessera-mlflow.{{ include "tessera.namespace" . }}:5000
{{- else -}}
{{- .Values.mlflow.trackingUri -}}
{{- end -}}
{{- end -}}

{{/* What Pod Security "restricted" asks of a pod, with the user of our images. */}}
{{- define "tessera.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What it asks of a container. */}}
{{- define "tessera.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* One egress rule of a network policy; nothing for a destination that names no peer, since an empty `to` means everywhere. */}}
{{- define "tessera.egressRule" -}}
{{- if or .cidrs .namespaces }}
- to:
    {{- range .namespaces }}
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ . }}
    {{- end }}
    {{- range .cidrs }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- if eq (int .) 53 }}
    - {protocol: UDP, port: {{ . }}}
    {{- end }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* Egress to pods of the chart. Call with (list $ component port). */}}
{{- define "tessera.egressToEmbedded" -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "tessera.selectorLabels" (list (index . 0) (index . 1)) | nindent 10 }}
  ports:
    - {protocol: TCP, port: {{ index . 2 }}}
{{- end -}}
