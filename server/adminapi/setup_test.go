package adminapi

import (
	"strings"
	"testing"
)

func TestSetup(t *testing.T) {
	s := &Setup{Host: "builder.example", Port: "2222", HostKey: "ssh-ed25519 AAAAC3Nz",
		Systems: []string{"x86_64-linux", "i686-linux"}, Features: []string{"big-parallel"}, MaxJobs: 8}
	tests := []struct{ kind, want string }{
		{"nix.conf", "builders = ssh-ng://nbd x86_64-linux,i686-linux /root/.ssh/id_ed25519 8 1 big-parallel - c3NoLWVkMjU1MTkgQUFBQUMzTno="},
		{"nixos", `systems = [ "x86_64-linux" "i686-linux" ];`},
		{"nixos", "programs.ssh.extraConfig = ''\n    Host nbd\n      HostName builder.example\n      Port 2222"},
		{"nix-darwin", `environment.etc."ssh/ssh_config.d/100-nbd.conf".text`},
		{"ssh", "[builder.example]:2222 ssh-ed25519 AAAAC3Nz"},
		{"github-action", "    nixbuild_token: ${{ secrets.NBD_TOKEN }}\n    ssh_address: builder.example\n    ssh_port: 2222\n    ssh_public_host_key: ssh-ed25519 AAAAC3Nz\n"},
		{"ssh", "Host nbd\n  HostName builder.example\n  Port 2222\n"},
	}
	for _, tt := range tests {
		got, err := s.Text(tt.kind)
		if err != nil {
			t.Fatalf("%s: %v", tt.kind, err)
		}
		if !strings.Contains(got, tt.want) {
			t.Errorf("%s: no %q in\n%s", tt.kind, tt.want, got)
		}
	}
	if _, err := s.Text("windows"); err == nil {
		t.Error("an unknown kind is not refused")
	}
}

func TestSetupAddress(t *testing.T) {
	tests := []struct {
		host, listen   string
		wantHost, port string
		fails          bool
	}{
		{"", "127.0.0.1:2222", "127.0.0.1", "2222", false},
		{"builder", ":2222", "builder", "2222", false},
		{"builder", "[::]:22", "builder", "22", false},
		{"", "[::]:22", "", "", true},
		{"", "nonsense", "", "", true},
	}
	for _, tt := range tests {
		s := Setup{Host: tt.host}
		err := s.SetAddress(tt.listen)
		if tt.fails != (err != nil) {
			t.Errorf("%q: error %v", tt.listen, err)
		} else if err == nil && (s.Host != tt.wantHost || s.Port != tt.port) {
			t.Errorf("%q: %s %s", tt.listen, s.Host, s.Port)
		}
	}
}
