package server

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

func TestSettingsCommand(t *testing.T) {
	ts := newTestServer(t, nil)
	var s struct {
		Timeout            int
		ReuseBuildFailures bool
		TrustedPublicKeys  []string
		AccessTokens       []string
		Substituters       []string
		Origins            map[string]string
	}
	ts.api(ts.alice, "settings", &s)
	if s.Timeout != 0 || !s.ReuseBuildFailures || s.Origins["timeout"] != "default" || len(s.Origins) < 20 {
		t.Errorf("all: %+v", s)
	}
	ts.api(ts.alice, "settings timeout --set 7", &s)
	if s.Timeout != 7 || s.Origins["timeout"] != "account" {
		t.Errorf("set: %+v", s)
	}
	const key = "test-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
	ts.api(ts.alice, "settings trusted-public-keys --add "+key, &s)
	if len(s.TrustedPublicKeys) != 2 || s.TrustedPublicKeys[1] != key {
		t.Errorf("add: %+v", s)
	}
	ts.api(ts.alice, "settings trusted-public-keys --remove test-1", &s)
	if len(s.TrustedPublicKeys) != 1 {
		t.Errorf("remove: %+v", s)
	}
	ts.api(ts.alice, "settings access-tokens --add cache.example=secret", &s)
	if len(s.AccessTokens) != 1 || strings.Contains(s.AccessTokens[0], "secret") {
		t.Errorf("a secret is shown: %+v", s)
	}
	fingerprint := gossh.FingerprintSHA256(ts.alice.PublicKey())
	ts.api(ts.alice, "settings substituters --set https://a.example https://b.example", &s)
	if len(s.Substituters) != 2 {
		t.Errorf("a list of words: %q", s.Substituters)
	}
	ts.api(ts.alice, "settings timeout --set 9 --ssh-key "+fingerprint, &s)
	if s.Timeout != 9 || s.Origins["timeout"] != "key" {
		t.Errorf("of a key: %+v", s)
	}
	ts.api(ts.addKey(), "settings timeout --show", &s)
	if s.Timeout != 7 {
		t.Errorf("of another key: %+v", s)
	}
	ts.api(ts.alice, "settings timeout --reset --ssh-key "+fingerprint, &s)
	ts.api(ts.alice, "settings timeout --reset", &s)
	if s.Timeout != 0 || s.Origins["timeout"] != "default" {
		t.Errorf("reset: %+v", s)
	}
	bob := newKey(t)
	ts.addAccount("bob", bob, nil)
	for args, says := range map[string]string{
		"timeout --reset 5":        "one word too many",
		"timeout 5":                "one word too many",
		"timeout --set x":          "timeout is ",
		"timeout --add 1":          "no list",
		"timeout --set 1 --show":   "one of",
		"timeout --set 1 --set 2":  "one of",
		"max-storage --set 1":      "operator",
		"caches --set file:///etc": "operator",
		"trusted-accounts --set bob --ssh-key " + fingerprint:                   "account as a whole",
		"timeout --set 1 --ssh-key " + gossh.FingerprintSHA256(bob.PublicKey()): "there is no key",
		"timeout --set 1 --ssh-key SHA256:x":                                    "there is no key",
		"signing-key-for-builds --set other":                                    "has the key test/alice-1 only",
		"--set 1":                                                               "name the setting",
		"access-tokens --set nonsense-secret":                                   "HOST=TOKEN",
	} {
		out, errs, status := ts.command(ts.alice, "api settings "+args, "")
		if out != "" || status == 0 || !strings.Contains(errs, says) || strings.Contains(errs, "nonsense-secret") {
			t.Errorf("%s: %d %s %s", args, status, out, errs)
		}
	}
	before := ts.store.Settings()
	reader := ts.addKey("account:read")
	if _, errs, status := ts.command(reader, "api settings timeout --set 1", ""); status != 1 || !strings.Contains(errs, "account:write") || ts.store.Settings().Of(store.SettingsOwner{Account: ts.account.ID})["timeout"] != before.Of(store.SettingsOwner{Account: ts.account.ID})["timeout"] {
		t.Errorf("set without account:write: %d %s", status, errs)
	}
}

func TestSigningKeyCommands(t *testing.T) {
	ts := newTestServer(t, nil)
	ci := ts.addKey("build:write")
	for _, line := range []string{"settings signing-key-for-builds --show", "show public-signing-key"} {
		var k apiSigningKey
		ts.api(ci, line, &k)
		if k.KeyName+":"+k.PublicKey != ts.account.PublicKey || k.KeyName != "test/alice-1" {
			t.Errorf("%s: %+v", line, k)
		}
		if out, errs, _ := ts.shell(ci, line); out != ts.account.PublicKey+"\n" {
			t.Errorf("%s in the shell: %q %q", line, out, errs)
		}
	}
}

// withToken runs a command as a client that has a token and no key.
func (ts *testServer) withToken(token, line string) (stdout, stderr string, status int) {
	ts.t.Helper()
	cfg := ts.clientConfig(ts.alice)
	cfg.User, cfg.Auth = "authtoken", nil
	conn, err := gossh.Dial("tcp", ts.addr, cfg)
	if err != nil {
		ts.t.Fatal(err)
	}
	defer conn.Close()
	s, err := conn.NewSession()
	if err != nil {
		ts.t.Fatal(err)
	}
	var out, errs bytes.Buffer
	s.Stdout, s.Stderr = &out, &errs
	if err := s.Setenv("NBD_TOKEN", token); err != nil {
		ts.t.Fatal(err)
	}
	if err := s.Start(line); err != nil {
		ts.t.Fatal(err)
	}
	status = (&pipe{Session: s}).status(ts.t.(*testing.T))
	return out.String(), errs.String(), status
}

func TestTokenCommands(t *testing.T) {
	ts := newTestServer(t, nil)
	var made apiNewToken
	ts.api(ts.alice, "tokens create --name ci --permissions build:read,store:read --ttl 1h", &made)
	if a, tok, err := ts.store.AccountByToken(t.Context(), made.Token); err != nil || a.ID != ts.account.ID || len(tok.Permissions) != 2 || time.Until(tok.Expires) > time.Hour {
		t.Errorf("%+v: %v, %v", made, tok, err)
	}
	revoked := made.Token
	// As an older version of the published action has it.
	ts.api(ts.alice, "tokens create --read-only --ttl-seconds 60", &made)
	if got := strings.Join(made.Permissions, " "); got != "build:read store:read account:read" || made.Expires == nil || made.Token == "" {
		t.Errorf("read-only: %+v", made)
	}
	if out, _, _ := ts.shell(ts.alice, "tokens create plain"); !strings.HasPrefix(out, "nbd_") || strings.Count(out, "\n") != 1 {
		t.Errorf("a token for scripts: %q", out)
	}
	var list []apiToken
	ts.api(ts.alice, "tokens list", &list)
	if len(list) != 3 {
		t.Errorf("%d tokens", len(list))
	}
	ts.api(ts.alice, "tokens revoke ci", &made)
	ts.api(ts.alice, "tokens list", &list)
	if len(list) != 2 || strings.Contains(fmt.Sprint(list), "nbd_") {
		t.Errorf("after revoke: %+v", list)
	}
	out, errs, status := ts.withToken(revoked, "api ssh-keys remove "+gossh.FingerprintSHA256(ts.alice.PublicKey()))
	if status != 1 || !strings.HasPrefix(errs, `{"error":"this token is not valid`) {
		t.Errorf("a revoked token: %d %s %s", status, out, errs)
	}
	ts.api(ts.alice, "tokens create --name admin --permissions account:read,account:write", &made)
	for line, says := range map[string]string{
		"api ssh-keys remove " + gossh.FingerprintSHA256(ts.alice.PublicKey()): "no other key",
		"api tokens revoke admin": "from another one",
		"api builds list":         "token admin does not have build:read",
	} {
		if out, errs, status := ts.withToken(made.Token, line); out != "" || status != 1 || !strings.Contains(errs, says) {
			t.Errorf("%s with a token: %d %s %s", line, status, out, errs)
		}
	}
	weak := ts.addKey("account:write", "build:read")
	for args, says := range map[string]string{
		"--name plain":                      "already",
		"--name 'a b'":                      "no space",
		"--name x --ttl soon":               "30d",
		"--name x --ttl -1h":                "30d",
		"--name x --ttl-seconds 0":          "number of seconds",
		"--name x --permissions root":       "permissions out of",
		"a --name b":                        "once",
		"--name x --ttl 1h --ttl-seconds 1": "one of",
	} {
		if out, errs, status := ts.command(ts.alice, "api tokens create "+args, ""); out != "" || status == 0 || !strings.Contains(errs, says) {
			t.Errorf("%s: %d %s %s", args, status, out, errs)
		}
	}
	if _, errs, status := ts.command(weak, "api tokens create --name up --permissions build:write", ""); status != 1 || !strings.Contains(errs, "build:write") {
		t.Errorf("a token with more permissions than its maker: %d %s", status, errs)
	}
	ts.api(weak, "tokens create --name same", &made)
	if got := strings.Join(made.Permissions, " "); got != "build:read" {
		t.Errorf("default permissions of a weak key's token: %q", got)
	}
}

// sshKeygen makes a key of a type with the real program, and signs with it.
func sshKeygen(t *testing.T, kind string) (public string, sign func(namespace, text string) string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	run := func(in string, args ...string) string {
		t.Helper()
		cmd := exec.Command("ssh-keygen", args...)
		cmd.Stdin = strings.NewReader(in)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("ssh-keygen %q (it is in Debian's openssh-client): %v %s", args, err, stderr.String())
		}
		return string(out)
	}
	run("", "-q", "-t", kind, "-N", "", "-C", "me@host", "-f", file)
	line, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(line)), func(namespace, text string) string {
		return run(text, "-Y", "sign", "-n", namespace, "-f", file)
	}
}

// TestAddKey: a key is added by who has it, for the account and server that the
// challenge names, and by nobody else.
func TestAddKey(t *testing.T) {
	ts := newTestServer(t, nil)
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		public, sign := sshKeygen(t, kind)
		var c apiChallenge
		ts.api(ts.alice, "ssh-keys add "+public, &c)
		if c.Namespace != "nbd" || !strings.Contains(c.Command, "ssh-keygen -Y sign -n nbd -f KEYFILE | ssh HOST shell ssh-keys add "+public+" --signature -") {
			t.Errorf("%+v", c)
		}
		out, errs, status := ts.command(ts.alice, "api ssh-keys add "+public+" --permissions store:read --signature -", sign("nbd", c.Challenge))
		if status != 0 || !strings.Contains(out, `"permissions":["store:read"]`) {
			t.Fatalf("%s: %d %s %s", kind, status, out, errs)
		}
		if _, errs, status := ts.command(ts.alice, "api ssh-keys add "+public+" --signature -", sign("nbd", c.Challenge)); status != 1 || !strings.Contains(errs, "already") {
			t.Errorf("again: %d %s", status, errs)
		}
	}
	var keys []apiKey
	ts.api(ts.alice, "ssh-keys list", &keys)
	if len(keys) != 4 || !keys[0].Current || keys[1].Comment != "me@host" {
		t.Errorf("keys: %+v", keys)
	}

	// In a line of the shell the signature is an argument.
	public, sign := sshKeygen(t, "ed25519")
	var c apiChallenge
	ts.api(ts.alice, "ssh-keys add "+public, &c)
	signature := sign("nbd", c.Challenge)
	block, _ := pem.Decode([]byte(signature))
	body := strings.Join(strings.Split(strings.TrimSpace(signature), "\n")[1:], "")
	body = strings.TrimSuffix(body, "-----END SSH SIGNATURE-----")
	bob := newKey(t)
	ts.addAccount("bob", bob, nil)
	stranger := newKey(t)
	forged, err := sshsig.Sign(strings.NewReader(c.Challenge), stranger, sshsig.HashSHA512, "nbd")
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		key       gossh.Signer
		signature string
	}{
		"another account":   {bob, body},
		"another namespace": {ts.alice, sign("file", c.Challenge)},
		"another text":      {ts.alice, sign("nbd", c.Challenge+"\n")},
		"another key":       {ts.alice, string(sshsig.Armor(forged))},
		"nothing":           {ts.alice, ""},
		"junk":              {ts.alice, "junk"},
		"cut":               {ts.alice, body[:40]},
		"too long":          {ts.alice, strings.Repeat("A", maxSignature+1)},
	} {
		if out, errs, status := ts.command(try.key, "api ssh-keys add "+public+" --signature -", try.signature); out != "" || status == 0 || !strings.Contains(errs, "signature") {
			t.Errorf("%s: %d %s %s", name, status, out, errs)
		}
	}
	if len(block.Bytes) == 0 {
		t.Fatal("no signature")
	}
	if out, errs, status := ts.shell(ts.alice, "ssh-keys add "+public+" --signature "+body); status != 0 {
		t.Errorf("a signature in one line: %d %s %s", status, out, errs)
	}

	var removed apiKey
	ts.api(ts.alice, "ssh-keys remove "+keys[1].Fingerprint, &removed)
	if removed.Fingerprint != keys[1].Fingerprint {
		t.Errorf("removed %+v", removed)
	}
	if _, errs, status := ts.command(ts.alice, "api ssh-keys remove "+keys[0].Fingerprint, ""); status != 1 || !strings.Contains(errs, "from another one") {
		t.Errorf("the session's own key: %d %s", status, errs)
	}
	if _, errs, status := ts.command(bob, "api ssh-keys remove "+keys[2].Fingerprint, ""); status != 1 || !strings.Contains(errs, "there is no key") {
		t.Errorf("another's key: %d %s", status, errs)
	}
	if _, errs, status := ts.command(ts.addKey("account:write", "account:read"), "api ssh-keys add "+public+" --permissions build:write", ""); status != 1 || !strings.Contains(errs, "build:write") {
		t.Errorf("a key with more permissions than who adds it: %d %s", status, errs)
	}
}

// TestChallengePeriod: a challenge holds for its period and the next one.
func TestChallengePeriod(t *testing.T) {
	_, secret, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := gossh.NewSignerFromKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	p := proof{secret: &proofSecret{}, server: "SHA256:x", account: store.Account{ID: 1, Name: "a"}, key: key.PublicKey(), now: time.Unix(1e9, 0)}
	sig, err := sshsig.Sign(strings.NewReader(p.challenge()), key, sshsig.HashSHA256, proofNamespace)
	if err != nil {
		t.Fatal(err)
	}
	text := string(sshsig.Armor(sig))
	for after, want := range map[time.Duration]bool{0: true, proofPeriod: true, 2 * proofPeriod: false, -proofPeriod: false} {
		later := p
		later.now = p.now.Add(after)
		if err := later.verify(text); (err == nil) != want {
			t.Errorf("after %v: %v", after, err)
		}
	}
	other := p
	other.secret = &proofSecret{}
	if other.verify(text) == nil {
		t.Error("another server takes it")
	}
}

// FuzzSignature: a signature is one or none, whatever it looks like.
func FuzzSignature(f *testing.F) {
	_, secret, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	key, err := gossh.NewSignerFromKey(secret)
	if err != nil {
		f.Fatal(err)
	}
	sig, err := sshsig.Sign(strings.NewReader("x"), key, sshsig.HashSHA256, proofNamespace)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(sshsig.Armor(sig)))
	p := proof{secret: &proofSecret{}, key: key.PublicKey(), now: time.Unix(1e9, 0)}
	f.Fuzz(func(t *testing.T, text string) {
		if p.verify(text) == nil {
			t.Error("a signature of the challenge was made up")
		}
	})
}
