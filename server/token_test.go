package server

import (
	"errors"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// tokenConfig is how a client without a key connects.
func (ts *testServer) tokenConfig() *gossh.ClientConfig {
	cfg := ts.clientConfig(ts.alice)
	cfg.User, cfg.Auth = tokenUser, nil
	return cfg
}

// dialToken opens a connection that nobody is known on yet.
func (ts *testServer) dialToken() *gossh.Client {
	ts.t.Helper()
	c, err := gossh.Dial("tcp", ts.addr, ts.tokenConfig())
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { _ = c.Close() })
	return c
}

// addToken makes a token of an account.
func (ts *testServer) addToken(a store.Account, t store.Token) (string, store.Token) {
	ts.t.Helper()
	secret, t, err := ts.store.AddToken(ts.t.Context(), a.ID, t)
	if err != nil {
		ts.t.Fatal(err)
	}
	return secret, t
}

// ping asks in a new session of c with a token whether it is served; the error
// has what the server said.
func (ts *testServer) ping(c *gossh.Client, variable, secret string) error {
	ts.t.Helper()
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	defer s.Close()
	if variable != "" {
		if err := s.Setenv(variable, secret); err != nil {
			return err
		}
	}
	var stderr syncBuffer
	s.Stderr = &stderr
	in, err := s.StdinPipe()
	if err != nil {
		return err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.Start("nix-daemon --stdio"); err != nil {
		return err
	}
	w, err := nixproto.NewClient(&pipe{s, out, in, &stderr}, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
	if err == nil {
		_, err = w.Do(&nixproto.QueryAllValidPaths{}, nil)
	}
	if err != nil {
		_ = in.Close()
		_ = s.Wait() // so that all of stderr is here
		return errors.New(err.Error() + ": " + stderr.String())
	}
	return in.Close()
}

// TestTokens: a token opens its account, whichever variable brings it.
func TestTokens(t *testing.T) {
	ts := newTestServer(t, nil)
	secret, _ := ts.addToken(ts.account, store.Token{Name: "ci", Permissions: []string{"store:read"}})
	for _, variable := range tokenVariables {
		if err := ts.ping(ts.dialToken(), variable, secret); err != nil {
			t.Errorf("%s: %v", variable, err)
		}
	}
	c := ts.dialToken()
	for range 3 { // one after the other, on one connection
		if err := ts.ping(c, "NBD_TOKEN", secret); err != nil {
			t.Fatal(err)
		}
	}
	if strings.Contains(ts.log.String(), secret) {
		t.Error("the log has the token")
	}
}

// TestTokensRefused: what opens nothing is one and the same error, and changes
// nothing; what lacks a permission names it.
func TestTokensRefused(t *testing.T) {
	ts := newTestServer(t, nil)
	bob := ts.addAccount("bob", newKey(t), nil)
	expired, _ := ts.addToken(ts.account, store.Token{Name: "old", Permissions: []string{"store:read"}, Expires: time.Now().Add(-time.Second)})
	revoked, _ := ts.addToken(ts.account, store.Token{Name: "revoked", Permissions: []string{"store:read"}})
	if _, err := ts.store.RemoveToken(t.Context(), ts.account.ID, "revoked"); err != nil {
		t.Fatal(err)
	}
	removed, _ := ts.addToken(bob, store.Token{Name: "x", Permissions: []string{"store:read"}})
	if err := ts.store.RemoveAccount(t.Context(), bob.ID); err != nil {
		t.Fatal(err)
	}
	poor, _ := ts.addToken(ts.account, store.Token{Name: "poor", Permissions: []string{"build:read"}})
	for name, secret := range map[string]string{"expired": expired, "revoked": revoked, "of a removed account": removed,
		"forged": "nbd_" + strings.Repeat("A", 43), "cut": revoked[:10], "padded": revoked + "A"} {
		err := ts.ping(ts.dialToken(), "NBD_TOKEN", secret)
		if err == nil || !strings.Contains(err.Error(), "nbd: error: "+errToken.Error()+"\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ts.ping(ts.dialToken(), "", ""); err == nil || !strings.Contains(err.Error(), "NBD_TOKEN") {
		t.Errorf("no token: %v", err)
	}
	if err := ts.ping(ts.dialToken(), "NBD_TOKEN", poor); err == nil || !strings.Contains(err.Error(), "token poor does not have store:read") {
		t.Errorf("without permission: %v", err)
	}
	// None is for that user alone.
	cfg := ts.tokenConfig()
	cfg.User = "root"
	if c, err := gossh.Dial("tcp", ts.addr, cfg); err == nil {
		_ = c.Close()
		t.Error("another user comes in with nothing")
	}
}

// TestOneTokenEach: a connection is one token's.
func TestOneTokenEach(t *testing.T) {
	ts := newTestServer(t, nil)
	bob := ts.addAccount("bob", newKey(t), nil)
	first, _ := ts.addToken(ts.account, store.Token{Name: "a", Permissions: []string{"store:read"}})
	second, _ := ts.addToken(bob, store.Token{Name: "b", Permissions: []string{"store:read"}})
	c := ts.dialToken()
	if err := ts.ping(c, "NBD_TOKEN", first); err != nil {
		t.Fatal(err)
	}
	if err := ts.ping(c, "NBD_TOKEN", second); err == nil || !strings.Contains(err.Error(), "another token") {
		t.Errorf("a second token: %v", err)
	}
	if err := ts.ping(c, "", ""); err == nil {
		t.Error("a session without token is served")
	}
	if err := ts.ping(c, "NBD_TOKEN", first); err != nil {
		t.Error(err)
	}
}

// TestTokenEnds: the end of a token, by time or by word, ends its connections.
func TestTokenEnds(t *testing.T) {
	ts := newTestServer(t, nil)
	short, _ := ts.addToken(ts.account, store.Token{Name: "short", Permissions: []string{"store:read"}, Expires: time.Now().Add(2 * time.Second)})
	long, token := ts.addToken(ts.account, store.Token{Name: "long", Permissions: []string{"store:read"}})
	a, b := ts.dialToken(), ts.dialToken()
	for c, secret := range map[*gossh.Client]string{a: short, b: long} {
		if err := ts.ping(c, "NBD_TOKEN", secret); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan struct{})
	go func() {
		_ = a.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the connection of an expired token stays")
	}
	if err := ts.ping(b, "NBD_TOKEN", long); err != nil {
		t.Fatal(err)
	}
	ts.Disconnect(func(c *Client) bool { return c.Token == token.ID })
	if err := ts.ping(b, "NBD_TOKEN", long); err == nil {
		t.Error("the connection of a revoked token stays")
	}
}

// TestTokenlessBound: who has no token yet counts as one who has not
// authenticated: there is a bound, and an end.
func TestTokenlessBound(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.MaxUnauthenticated, c.HandshakeTimeout = 4, 3*time.Second })
	first := ts.dialToken()
	if c, err := gossh.Dial("tcp", ts.addr, ts.tokenConfig()); err == nil {
		_ = c.Close()
		t.Error("a second connection without token is taken, and one is the bound for an address")
	}
	for range maxTokenless {
		if _, err := first.NewSession(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.NewSession(); err == nil {
		t.Error("no bound on sessions")
	}
	ended := make(chan error, 1)
	go func() { ended <- first.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("a connection without token stays")
	}
	// With a token it stays, and makes room.
	secret, _ := ts.addToken(ts.account, store.Token{Name: "ci", Permissions: []string{"store:read"}})
	c := ts.dialToken()
	if err := ts.ping(c, "NBD_TOKEN", secret); err != nil {
		t.Fatal(err)
	}
	if err := ts.ping(ts.dialToken(), "NBD_TOKEN", secret); err != nil {
		t.Fatal(err)
	}
	if err := ts.ping(c, "NBD_TOKEN", secret); err != nil {
		t.Error(err)
	}
}
