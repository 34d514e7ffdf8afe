package adminapi

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"text/template"
)

// A Setup is what a client has to be told about a server.
type Setup struct {
	Host string // name or address, as the client reaches it
	Port string
	// HostKey is the server's public key, "type base64".
	HostKey  string
	Systems  []string
	Features []string
	MaxJobs  int
}

// SetupKinds are the kinds of configuration that Text knows.
var SetupKinds = []string{"nix.conf", "nixos", "nix-darwin", "ssh", "github-action"}

// HostKeyBase64 is the host key as the eighth field of a machines line and
// publicHostKey want it.
func (s *Setup) HostKeyBase64() string {
	return base64.StdEncoding.EncodeToString([]byte(s.HostKey))
}

// KnownHost is the line for a known_hosts file.
func (s *Setup) KnownHost() string {
	if s.Port == "22" {
		return s.Host + " " + s.HostKey
	}
	return "[" + s.Host + "]:" + s.Port + " " + s.HostKey
}

// Nix gives a list in the Nix language.
func (s *Setup) Nix(list []string) string {
	quoted := make([]string, len(list))
	for i, v := range list {
		quoted[i] = fmt.Sprintf("%q", v)
	}
	return "[ " + strings.Join(quoted, " ") + " ]"
}

// Commas joins a list as a machines line wants it.
func (s *Setup) Commas(list []string) string {
	if len(list) == 0 {
		return "-"
	}
	return strings.Join(list, ",")
}

// The port stands in the ssh configuration, under a name of its own, because
// Nix before 2.33 does not take one in the address of a machine.
const (
	sshText = `{{define "ssh"}}Host nbd
  HostName {{.Host}}
  Port {{.Port}}
  User nbd
  IdentityFile ~/.ssh/id_ed25519
  IdentitiesOnly yes
{{end}}`
	sshSetup = `# ~/.ssh/config of whoever runs the build: root (~root/.ssh/config) where a
# nix-daemon does, else yourself. IdentityFile is the key that you were given an
# account for.
{{template "ssh" .}}
# ~/.ssh/known_hosts of the same user
{{.KnownHost}}
`
	confSetup = `# /etc/nix/nix.conf, one line. The ssh configuration that goes with it:
#   nbd setup --for ssh
builders = ssh-ng://nbd {{.Commas .Systems}} /root/.ssh/id_ed25519 {{.MaxJobs}} 1 {{.Commas .Features}} - {{.HostKeyBase64}}
builders-use-substitutes = true
`
	nixosSetup = `# configuration.nix{{if .Darwin}} of nix-darwin{{end}}
{
  nix.distributedBuilds = true;
  nix.settings.builders-use-substitutes = true;
  nix.buildMachines = [{
    hostName = "nbd";
    protocol = "ssh-ng";
    sshUser = "nbd";
    sshKey = "/root/.ssh/id_ed25519"; # root's key that has an account
    systems = {{.Nix .Systems}};
    supportedFeatures = {{.Nix .Features}};
    maxJobs = {{.MaxJobs}};
    publicHostKey = "{{.HostKeyBase64}}";
  }];
  {{if .Darwin}}environment.etc."ssh/ssh_config.d/100-nbd.conf".text{{else}}programs.ssh.extraConfig{{end}} = ''
    Host nbd
      HostName {{.Host}}
      Port {{.Port}}
  '';
}
`
	// The published action takes where the server is from its inputs.
	actionSetup = `# .github/workflows/*.yml: a step after the one that installs Nix. NBD_TOKEN is a
# secret of the repository, made by
#   nbd admin token create ACCOUNT --name ci --permissions build:read,build:write,store:read,store:write
- uses: nixbuild/nixbuild-action@v24
  with:
    nixbuild_token: ${{"{{"}} secrets.NBD_TOKEN }}
    ssh_address: {{.Host}}
    ssh_port: {{.Port}}
    ssh_public_host_key: {{.HostKey}}
`
)

var setupText = template.Must(template.New("setup").Parse(sshText))

// Text returns the configuration of a kind out of SetupKinds.
func (s *Setup) Text(kind string) (string, error) {
	texts := map[string]string{"nix.conf": confSetup, "nixos": nixosSetup, "nix-darwin": nixosSetup, "ssh": sshSetup, "github-action": actionSetup}
	text, ok := texts[kind]
	if !ok {
		return "", &HintError{fmt.Errorf("there is no configuration for %q", kind),
			"--for takes " + strings.Join(SetupKinds, ", ")}
	}
	t, err := template.Must(setupText.Clone()).Parse(text)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, struct {
		*Setup
		Darwin bool
	}{s, kind == "nix-darwin"})
	return b.String(), err
}

// SetAddress takes host and port from a listen address, where they are not set.
func (s *Setup) SetAddress(listen string) error {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return fmt.Errorf("listen address: %w", err)
	}
	if ip := net.ParseIP(host); s.Host == "" && host != "" && (ip == nil || !ip.IsUnspecified()) {
		s.Host = host
	}
	if s.Port == "" {
		s.Port = port
	}
	if s.Host == "" {
		return &HintError{errors.New("the server listens on every address, so its name is not known"), "name it with --host"}
	}
	return nil
}

// Setup asks the server for what a client has to be told, and returns the
// configuration of a kind out of SetupKinds. Host and port are those by which
// clients reach it; empty ones mean those that it listens on.
func (c *Client) Setup(ctx context.Context, host, port, kind string) (string, error) {
	status, err := c.Status(ctx)
	if err != nil {
		return "", err
	}
	s := Setup{Host: host, Port: port, HostKey: status.HostKey, Systems: status.Systems, Features: status.Features,
		MaxJobs: status.Queue.Total.Guests}
	if err := s.SetAddress(status.SSH); err != nil {
		return "", err
	}
	return s.Text(kind)
}
