package server

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/store"
)

// What an account tries with settings, tokens, ids and addresses.

// With variables of a session and attributes of a derivation nobody gets at what
// is the account's as a whole or the operator's, not even with account:write.
func TestAttackSettingsFromBelow(t *testing.T) {
	ts := newTestServer(t, nil)
	ts.set(ts.account, "settings-from-drv-env", "true")
	limited := ts.addKey("build:write", "build:read", "store:read")
	values := map[string]string{
		"max-storage": "1T", "max-running-builds": "1000", "max-connections": "1000", "max-cpu-hours-per-month": "1000",
		"trusted-accounts": "alice", "offer-signed": "cache.nixos.org-1", "share-results": "true", "public-cache": "true",
		"oidc-subjects": "issuer=https://x.example;audience=a;subject=b",
		"substituters":  "https://x.example", "trusted-public-keys": "x-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
		"allow-addresses": "10.0.0.0/8",
		"caches":          "https://x.example", "access-tokens": "x.example=y", "signing-key-for-builds": "x-1",
		"settings-from-ssh-env": "true", "settings-from-drv-env": "true", "default-permissions": "account:write",
	}
	for _, s := range settings.All() {
		if s.Scope == settings.Open {
			continue
		}
		value, ok := values[s.Name]
		if !ok {
			t.Errorf("the test has no value for %s", s.Name)
		}
		for _, prefix := range []string{"NBD_", "NIXBUILDNET_"} {
			variable := prefix + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_"))
			keys := map[string]bool{"limited": true, "full": s.Scope != settings.Guarded}
			for who, refused := range keys {
				key := limited
				if who == "full" {
					key = ts.alice
				}
				if err := ts.ping(ts.dial(key), variable, value); refused && (err == nil || !strings.Contains(err.Error(), variable)) {
					t.Errorf("%s by the environment, %s key: %v", variable, who, err)
				}
			}
			session := &Session{Client: &Client{Account: ts.account, Permissions: []string{"build:write"}}, book: ts.book, Log: ts.Server.log}
			d := drv("x")
			d.Env[variable] = value
			if e, err := session.settingsFor(d, Limits{}); err == nil || !strings.Contains(err.Error(), variable) {
				t.Errorf("%s by a derivation: %v, origin %v", variable, err, e.Origin(s.Name))
			}
		}
	}
	// Paths of the host, in any spelling, from any level of an account.
	for _, url := range []string{"file:///etc", "FILE:///etc", "File:/etc", "file://localhost/etc", "https://x.example,file:///", "file:etc"} {
		for _, name := range []string{"substituters", "caches"} {
			variable := "NBD_" + strings.ToUpper(name)
			if err := ts.ping(ts.dial(ts.alice), variable, url); err == nil || !strings.Contains(err.Error(), variable) {
				t.Errorf("%s=%s: %v", variable, url, err)
			}
			for _, op := range []string{"--set", "--add"} {
				if out, errs, status := ts.command(ts.alice, fmt.Sprintf("api settings %s %s %s", name, op, url), ""); status == 0 {
					t.Errorf("%s %s %s: %s %s", name, op, url, out, errs)
				}
			}
		}
	}
}

// Values with control characters, and huge ones, are one clear error each, and
// change nothing.
func TestAttackHostileValues(t *testing.T) {
	ts := newTestServer(t, nil)
	before, _, _ := ts.command(ts.alice, "api settings", "")
	huge := strings.Repeat("9", 1<<12)
	for _, line := range []string{
		"settings timeout --set '7\n8'", "settings timeout --set '7\x008'", "settings timeout --set -1", "settings timeout --set 1e9",
		"settings trusted-accounts --set 'alice\x00'", "settings trusted-accounts --set '../alice'", "settings trusted-accounts --set Alice",
		"settings offer-signed --set 'k:\x1b[2J'", "settings trusted-public-keys --set 'a-1:xxxx'", "settings substituters --set 'https://x\x7f/'",
		"settings substituters --set 'http://x y\x00.example'", "settings access-tokens --set nohost", "settings max-storage --set 1",
		"settings signing-key-for-builds --set other-1", "settings trusted-accounts --set " + strings.Repeat("a ", 101) + huge,
		"settings 'timeout\n' --set 1", "settings __proto__ --set 1", "tokens create 'a\nb'", "tokens create " + strings.Repeat("a", 65),
	} {
		out, errs, status := ts.command(ts.alice, "api "+line, "")
		var e struct{ Error string }
		if status == 0 || out != "" || json.Unmarshal([]byte(errs), &e) != nil || e.Error == "" || strings.Count(errs, "\n") != 1 || strings.ContainsAny(errs, "\x00\x1b\x7f") {
			t.Errorf("%q: %d %q %q", line, status, out, errs)
		}
	}
	if after, _, _ := ts.command(ts.alice, "api settings", ""); after != before {
		t.Errorf("changed: %s", after)
	}
	// Tags are bounded as well, and shown without control characters.
	c := ts.dial(ts.alice)
	for name, value := range map[string]string{"NBD_TAG_" + strings.Repeat("a", 65): "x", "NBD_TAG_A": strings.Repeat("x", 1025), "NBD_TAG_a,b": "x", "NBD_TAG_\x1b": "x"} {
		if err := ts.ping(c, name, value); err == nil {
			t.Errorf("%q=%.20q is taken", name, value)
		}
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for i := range 2 * maxEnv {
		if s.Setenv(fmt.Sprintf("NBD_TAG_%d", i), "x") == nil {
			taken++
		}
	}
	if out, err := s.CombinedOutput("api settings"); err == nil || taken > maxEnv {
		t.Errorf("%d variables are taken: %.200s", taken, out)
	}
}

// Tokens give no more than who made them has, and open no other account.
func TestAttackTokens(t *testing.T) {
	ts := newTestServer(t, nil)
	limited := ts.addKey("account:write", "store:read")
	for _, p := range []string{"build:write", "store:read,store:write", "account:read"} {
		if out, errs, status := ts.command(limited, "api tokens create --permissions "+p, ""); status == 0 || !strings.Contains(errs, "permission denied") {
			t.Errorf("%s: %s %s", p, out, errs)
		}
	}
	ts.set(ts.account, "default-permissions", strings.Join(store.Permissions(), " "))
	var made apiNewToken
	ts.api(limited, "tokens create plain", &made)
	if got := strings.Join(made.Permissions, " "); got != "store:read account:write" {
		t.Errorf("permissions %q", got)
	}
	secret, _ := ts.addToken(ts.account, store.Token{Name: "gone", Expires: time.Now().Add(-time.Second)})
	for name, token := range map[string]string{
		"expired": secret, "cut": made.Token[:len(made.Token)-1], "longer": made.Token + "A", "prefix": "nbd_", "nothing": " ",
		"hash": made.Name, "huge": strings.Repeat("A", 1<<15), "control": made.Token[:10] + "\x00" + made.Token[11:],
	} {
		if err := ts.ping(ts.dialToken(), "NBD_TOKEN", token); err == nil {
			t.Errorf("%s: it opens the account", name)
		}
	}
	bob := newKey(t)
	ts.addAccount("bob", bob, nil)
	if _, errs, status := ts.command(bob, "api tokens revoke plain", ""); status == 0 || !strings.Contains(errs, "there is no token") {
		t.Errorf("bob revokes alice's: %s", errs)
	}
	// A revoked token is shut out of connections that are open.
	c := ts.dialToken()
	if err := ts.ping(c, "NBD_TOKEN", made.Token); err != nil {
		t.Fatal(err)
	}
	ts.api(ts.alice, "tokens revoke plain", new(any))
	if err := ts.ping(c, "NBD_TOKEN", made.Token); err == nil {
		t.Error("a revoked token is served")
	}
}

// Ids, fingerprints and names of others are answered as what does not exist.
func TestAttackIDsOfOthers(t *testing.T) {
	ts := newTestServer(t, nil)
	key := newKey(t)
	ts.addAccount("mallory", key, nil)
	b := ts.addBuild(ts.account.ID, nil)
	for _, line := range []string{
		"builds show %d", "builds log %d", "builds cancel %d", "builds restart %d", "builds attach %d", "why %d",
	} {
		mine := fmt.Sprintf("api "+line, b.ID)
		none := fmt.Sprintf("api "+line, b.ID+1_000_000)
		out1, err1, status1 := ts.command(key, mine, "")
		out2, err2, status2 := ts.command(key, none, "")
		err1 = strings.ReplaceAll(err1, fmt.Sprint(b.ID), "N")
		err2 = strings.ReplaceAll(err2, fmt.Sprint(b.ID+1_000_000), "N")
		if out1 != "" || status1 == 0 || out1 != out2 || err1 != err2 || status1 != status2 {
			t.Errorf("%s: alice's %d %s %s, nobody's %d %s %s", line, status1, out1, err1, status2, out2, err2)
		}
	}
	var list []apiBuild
	ts.api(key, "builds list --reused", &list)
	if len(list) != 0 {
		t.Errorf("mallory's builds: %+v", list)
	}
	var sum apiSummary
	ts.api(key, "builds summary", &sum)
	if sum.BuildCount != 0 {
		t.Errorf("mallory's sum: %+v", sum)
	}
	if _, errs, status := ts.command(key, "api result revoke 1", ""); status == 0 {
		t.Errorf("accounts revoke results: %s", errs)
	}
}

// No address of the host or of the networks around it is reached for an
// account, by name, spelling, redirect or narinfo.
func TestAttackAddresses(t *testing.T) {
	reached := make(chan string, 100)
	inner := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { reached <- r.URL.Path }))
	defer inner.Close()
	port := inner.URL[strings.LastIndex(inner.URL, ":"):]
	u := newSubstituterTest(t)
	p := builtPath(t, "x", "x")
	n := 0
	for _, host := range []string{
		"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]", "127.1", "2130706433", "0x7f000001",
		"[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]", "169.254.169.254", "localhost.", "[fe80::1%25lo]",
	} {
		for _, user := range []string{"", "user:password@"} {
			url := "http://" + user + host + port
			n++
			s := u.session(fmt.Sprint("mallory-", n), nil)
			e, err := settings.Defaults().With(settings.Layer{Level: settings.Account, Values: map[string]string{"substituters": url}})
			if err != nil {
				t.Fatal(err)
			}
			if len(e.Notes) > 0 {
				continue // it is no value
			}
			s.Settings = e
			have, err := u.Ensure(t.Context(), s, []nixproto.StorePath{p.Path}, nil)
			if err != nil || len(have) != 0 {
				t.Errorf("%s: %v, %v", url, have, err)
			}
		}
	}
	select {
	case path := <-reached:
		t.Errorf("%s was reached", path)
	default:
	}
}

// A log that is uploaded takes no more than max-storage leaves.
func TestAttackEndlessLog(t *testing.T) {
	ts := newTestServer(t, nil)
	ts.set(ts.account, "max-storage", "3M")
	endless := func(w *nixproto.Writer) error {
		_, err := io.CopyN(w, rand.Reader, 20<<20)
		return err
	}
	q := &nixproto.AddBuildLog{DrvPath: testDrv}
	if resp, err := ts.worker(ts.alice).Do(q, endless); err == nil || !strings.Contains(err.Error(), "max-storage") {
		t.Errorf("%v, %v", resp, err)
	}
	if size, err := ts.store.ViewSize(t.Context(), ts.account.ID); err != nil || size > 3<<20 {
		t.Errorf("%d bytes, %v", size, err)
	}
}
