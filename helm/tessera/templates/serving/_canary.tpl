{{/* The strategy of a Rollout: questions before the first user, then more and more users. Call with (list $ name model). */}}
{{- define "tessera.canary" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $canary := (index . 2).canary }}
{{- $full := printf "tessera-serving-%s" $name -}}
canary:
  stableService: {{ $full }}
  canaryService: {{ $full }}-canary
  maxUnavailable: 0
  {{- if $canary.dynamicStableScale }}
  # No abortScaleDownDelaySeconds: with both, an abort loses requests.
  dynamicStableScale: true
  {{- end }}
  trafficRouting:
    {{- if eq $root.Values.serving.router "traefik" }}
    traefik: {weightedTraefikServiceName: {{ $full }}}
    {{- else }}
    plugins:
      argoproj-labs/gatewayAPI:
        httpRoute: {{ $full }}
        namespace: {{ include "tessera.namespace" $root }}
    {{- end }}
  {{- if $root.Values.serving.prometheus }}
  analysis:
    startingStep: 3
    templates:
      - templateName: {{ $full }}-metrics
    args:
      - {name: canary, valueFrom: {podTemplateHashValue: Latest}}
      - {name: stable, valueFrom: {podTemplateHashValue: Stable}}
  {{- end }}
  steps:
    - setCanaryScale: {replicas: 1}
    - analysis:
        templates:
          - templateName: {{ $full }}-questions
    # Servers for the first users come before them, and the one that was asked stays: by its traffic, none yet, it would go.
    - setCanaryScale: {weight: {{ int (first $canary.weights) }}}
    {{- range $number, $weight := $canary.weights }}
    - setWeight: {{ int $weight }}
    {{- if eq $number 0 }}
    - setCanaryScale: {matchTrafficWeight: true}
    {{- end }}
    - pause: {duration: {{ int $canary.stepSeconds }}s}
    {{- end }}
{{- end -}}

{{/* A metric of the analysis. Call with (dict "name" "query" "condition" "canary" "prometheus"). */}}
{{- define "tessera.analysisMetric" -}}
- name: {{ .name }}
  interval: {{ int .canary.checkSeconds }}s
  initialDelay: {{ int .canary.checkSeconds }}s
  failureLimit: 1
  consecutiveErrorLimit: 4
  successCondition: len(result) == 0 || isNaN(result[0]) || result[0] <= {{ .limit }}
  provider:
    prometheus:
      address: {{ .prometheus }}
      query: {{ .query | quote }}
{{- end -}}
