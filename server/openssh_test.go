package server

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// openSSH runs OpenSSH's client against the server.
func (ts *testServer) openSSH(t *testing.T, key string, stdin string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	known := filepath.Join(t.TempDir(), "known_hosts")
	line := knownhosts.Line([]string{knownhosts.Normalize(ts.addr)}, ts.cfg.HostKey.PublicKey())
	if err := os.WriteFile(known, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", append([]string{"-F", "/dev/null", "-p", port, "-i", key, "-o", "IdentitiesOnly=yes",
		"-o", "BatchMode=yes", "-o", "UserKnownHostsFile=" + known, "-o", "StrictHostKeyChecking=yes", host}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatalf("this test needs OpenSSH's client (Debian: apt install openssh-client): %v", err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestOpenSSH: what its users see.
func TestOpenSSH(t *testing.T) {
	ts := newTestServer(t, nil)
	key := keyFile(t, ts)
	for _, test := range []struct {
		args   []string
		status int
		prints string // on stdout; "" is nothing
		says   string // on stderr
	}{
		{[]string{"nix-daemon", "--stdio"}, 0, "", ""}, // an empty session
		{[]string{"uname"}, 127, "", `nbd: error: command "uname" is not available`},
		{nil, 0, "", ""}, // the shell on plain pipes, until their end
		{[]string{"-t", "-t"}, 0, "account alice", ""},
		{[]string{"-s", "sftp"}, 255, "", "subsystem request failed"},
		{[]string{"-A", "nix-daemon", "--stdio", "--frob"}, 1, "", `option "--frob" is not supported`},
	} {
		stdout, stderr, status := ts.openSSH(t, key, "", test.args...)
		if status != test.status || !strings.Contains(stderr, test.says) || !strings.Contains(stdout, test.prints) || (stdout == "") != (test.prints == "") {
			t.Errorf("ssh %q: status %d, %q, %q", test.args, status, stdout, stderr)
		}
	}
	_, stderr, _ := ts.openSSH(t, key, "", "-v", "nix-daemon", "--stdio")
	want := defaultCiphers()[0]
	if !strings.Contains(stderr, "cipher: "+want) {
		t.Errorf("OpenSSH's client does not choose %s:\n%s", want, stderr)
	}
	strange := t.TempDir()
	if _, err := LoadHostKey(strange); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status := ts.openSSH(t, filepath.Join(strange, HostKeyFile), "", "nix-daemon", "--stdio"); status != 255 || !strings.Contains(stderr, "Permission denied") {
		t.Errorf("unknown key: status %d, %q", status, stderr)
	}
}

// TestKeyTypes: keys of all kinds that OpenSSH makes by default open a
// connection, and RSA with SHA-1 does not.
func TestKeyTypes(t *testing.T) {
	ts := newTestServer(t, nil)
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		file := filepath.Join(t.TempDir(), kind)
		if out, err := exec.Command("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", file).CombinedOutput(); err != nil {
			t.Fatalf("this test needs OpenSSH's client (Debian: apt install openssh-client): %v: %s", err, out)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := gossh.ParsePrivateKey(text)
		if err != nil {
			t.Fatal(err)
		}
		ts.addAccount("user-"+kind, signer, nil)
		if _, stderr, status := ts.openSSH(t, file, "", "nix-daemon", "--stdio"); status != 0 {
			t.Errorf("%s: status %d, %q", kind, status, stderr)
		}
		if kind != "rsa" {
			continue
		}
		if _, _, status := ts.openSSH(t, file, "", "-o", "PubkeyAcceptedAlgorithms=ssh-rsa", "nix-daemon", "--stdio"); status != 255 {
			t.Errorf("RSA with SHA-1: status %d", status)
		}
	}
}
