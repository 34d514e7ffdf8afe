package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
)

func TestAuthentication(t *testing.T) {
	ts := newTestServer(t, nil)
	stranger := newKey(t)
	if c, err := gossh.Dial("tcp", ts.addr, ts.clientConfig(stranger)); err == nil {
		_ = c.Close()
		t.Error("an unknown key opens a connection")
	}
	if want := gossh.FingerprintSHA256(stranger.PublicKey()); !strings.Contains(ts.log.String(), want) {
		t.Errorf("log does not name the refused key %s", want)
	}
	for name, methods := range map[string][]gossh.AuthMethod{
		"none": nil, "password": {gossh.Password("x")},
		"interactive": {gossh.KeyboardInteractive(func(string, string, []string, []bool) ([]string, error) { return nil, nil })},
	} {
		cfg := ts.clientConfig(stranger)
		cfg.Auth = methods
		if c, err := gossh.Dial("tcp", ts.addr, cfg); err == nil {
			_ = c.Close()
			t.Errorf("%s opens a connection", name)
		}
	}
	for _, user := range []string{"root", "", "authtoken"} {
		cfg := ts.clientConfig(ts.alice)
		cfg.User = user
		c, err := gossh.Dial("tcp", ts.addr, cfg)
		if err != nil {
			t.Errorf("user %q: %v", user, err)
			continue
		}
		_ = c.Close()
	}
}

// TestWhoIsIt: a client is whose key it signed with, whatever it offered before.
func TestWhoIsIt(t *testing.T) {
	ts := newTestServer(t, nil)
	bob := newKey(t)
	ts.addAccount("bob", bob, nil)
	var account string
	ts.builder.build = func(_ context.Context, s *Session, _ *BuildRequest, _ LogSink) (*nixproto.BuildResult, error) {
		account = s.Client.Account.Name
		return &nixproto.BuildResult{}, nil
	}
	for want, keys := range map[string][]gossh.Signer{
		"alice": {ts.alice, bob}, "bob": {newKey(t), newKey(t), newKey(t), newKey(t), newKey(t), newKey(t), newKey(t), bob, ts.alice},
	} {
		cfg := ts.clientConfig(ts.alice)
		cfg.Auth = []gossh.AuthMethod{gossh.PublicKeys(keys...)}
		c, err := gossh.Dial("tcp", ts.addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		client, err := nixproto.NewClient(ts.exec(c, "nix-daemon --stdio"), nixproto.Hello{Version: nixproto.MaxWorker}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Do(&nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}, nil); err != nil {
			t.Fatal(err)
		}
		if account != want {
			t.Errorf("the server takes %s for %q", want, account)
		}
	}
}

func TestRefusedCommands(t *testing.T) {
	ts := newTestServer(t, nil)
	c := ts.dial(ts.alice)
	for command, status := range map[string]int{
		"uname -a": 127, "sftp-server": 127, "nix-daemon --stdio --process-ops": 1, "nix-store --gc": 1, "'": 1,
		strings.Repeat("a", 20<<10): 1,
	} {
		p := ts.exec(c, command)
		if got := p.status(t); got != status {
			t.Errorf("%.20q: exit status %d, want %d", command, got, status)
		}
		if text := p.stderr.String(); strings.Count(text, "\n") != 1 || len(text) > 300 {
			t.Errorf("%.20q: %q", command, text)
		}
	}
}

func TestRefusedRequests(t *testing.T) {
	ts := newTestServer(t, nil)
	c := ts.dial(ts.alice)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestSubsystem("sftp"); err == nil {
		t.Error("sftp was granted")
	}
	for _, name := range []string{"auth-agent-req@openssh.com", "x11-req", "signal", "break", "window-change", "no-such-request"} {
		if ok, err := s.SendRequest(name, true, []byte("junk")); ok || err != nil {
			t.Errorf("%s: %t, %v", name, ok, err)
		}
	}
	for _, name := range []string{"tcpip-forward", "streamlocal-forward@openssh.com", "no-such-request"} {
		if ok, _, err := c.SendRequest(name, true, []byte("junk")); ok || err != nil {
			t.Errorf("%s: %t, %v", name, ok, err)
		}
	}
	for _, name := range []string{"direct-tcpip", "x11", "forwarded-tcpip", "no-such-channel"} {
		var refused *gossh.OpenChannelError
		if _, _, err := c.OpenChannel(name, []byte("junk")); !errors.As(err, &refused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ok, _, err := c.SendRequest("keepalive@openssh.com", true, nil); ok || err != nil {
		t.Errorf("keep-alive of the client: %t, %v", ok, err)
	}
}

func TestEnvironment(t *testing.T) {
	ts := newTestServer(t, nil)
	var got map[string]string
	ts.builder.build = func(_ context.Context, s *Session, _ *BuildRequest, _ LogSink) (*nixproto.BuildResult, error) {
		got = s.Env
		return &nixproto.BuildResult{}, nil
	}
	s, err := ts.dial(ts.alice).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	set := func(name, value string, want bool) {
		t.Helper()
		if err := s.Setenv(name, value); (err == nil) != want {
			t.Errorf("env %s: %v", name, err)
		}
	}
	set("LANG", "C.UTF-8", true)
	set("NBD_TIMEOUT", "77", true)
	set("NIXBUILDNET_REUSE_BUILD_FAILURES", "false", true)
	set("LD_PRELOAD", "x", true)
	set("NBD_TIMEOUT", "78", true)
	set("NBD_HUGE", strings.Repeat("x", maxEnvBytes), false)
	for i := range 2 * maxEnv {
		set(fmt.Sprintf("NBD_X%d", i), "", i < maxEnv-2)
	}
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("nix-daemon --stdio"); err != nil {
		t.Fatal(err)
	}
	set("NBD_LATE", "x", false)
	c, err := nixproto.NewClient(struct {
		io.Reader
		io.Writer
	}{out, in}, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Do(&nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}, nil); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"NBD_TIMEOUT": "78", "NIXBUILDNET_REUSE_BUILD_FAILURES": "false"}
	for i := range maxEnv - 2 {
		want[fmt.Sprintf("NBD_X%d", i)] = ""
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestSessionsOnOneConnection: they are independent, and there is an end to
// them.
func TestSessionsOnOneConnection(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.MaxSessions = 3 })
	conn := ts.dial(ts.alice)
	var pipes []*pipe
	var clients []*nixproto.Client
	for range 3 {
		p := ts.exec(conn, "nix-daemon --stdio")
		c, err := nixproto.NewClient(p, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
		if err != nil {
			t.Fatal(err)
		}
		pipes, clients = append(pipes, p), append(clients, c)
	}
	if _, err := conn.NewSession(); err == nil {
		t.Error("a fourth session is open")
	}
	if n := ts.Sessions(); n != 3 {
		t.Errorf("%d sessions", n)
	}
	if err := pipes[1].Close(); err != nil {
		t.Fatal(err)
	}
	if status := pipes[1].status(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for _, i := range []int{0, 2} {
		if _, err := clients[i].Do(&nixproto.QueryAllValidPaths{}, nil); err != nil {
			t.Errorf("session %d: %v", i, err)
		}
	}
	ts.exec(conn, "nix-daemon --stdio") // its place is free
}

// TestCiphers: what is offered is what the processor does well, or what was
// configured.
func TestCiphers(t *testing.T) {
	for _, offered := range [][]string{nil, {gossh.CipherAES256CTR}} {
		ts := newTestServer(t, func(c *Config) { c.Ciphers = offered })
		if offered == nil {
			offered = defaultCiphers()
		}
		for _, cipher := range gossh.SupportedAlgorithms().Ciphers {
			cfg := ts.clientConfig(ts.alice)
			cfg.Ciphers = []string{cipher}
			c, err := gossh.Dial("tcp", ts.addr, cfg)
			if err == nil {
				_ = c.Close()
			}
			if want := strings.Contains(strings.Join(offered, " "), cipher); (err == nil) != want {
				t.Errorf("%s: %v", cipher, err)
			}
		}
	}
	cfg := Config{Ciphers: []string{"rot13"}}
	if err := checkCiphers(cfg.Ciphers); err == nil || !strings.Contains(err.Error(), "rot13") {
		t.Errorf("an unknown cipher: %v", err)
	}
}

// ended waits until the server has closed a connection.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the server keeps the connection open")
	}
}

func TestHandshakeTimeout(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.HandshakeTimeout = 50 * time.Millisecond })
	c, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ended(t, c)
	if !strings.Contains(ts.log.String(), "no authentication in time") {
		t.Error("nothing in the log")
	}
}

// TestHandshakeTimeoutEnds: the limit is for the handshake only.
func TestHandshakeTimeoutEnds(t *testing.T) {
	const limit = 300 * time.Millisecond
	ts := newTestServer(t, func(c *Config) { c.HandshakeTimeout = limit })
	conn := ts.dial(ts.alice)
	select {
	case <-time.After(2 * limit):
	case <-waited(conn.Wait):
		t.Fatal("the connection was closed")
	}
	ts.exec(conn, "nix-daemon --stdio")
}

// waited returns what is closed when f returns.
func waited(f func() error) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		_ = f() // how it ended does not matter
		close(done)
	}()
	return done
}

func TestMaxUnauthenticated(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.MaxUnauthenticated = 8 }) // 2 from one address
	known := ts.dial(ts.alice)                                           // does not count
	var open []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.ReadFull(c, make([]byte, 8)); err != nil { // the server's greeting
			t.Fatal(err)
		}
		open = append(open, c)
	}
	third, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	ended(t, third)
	ts.exec(known, "nix-daemon --stdio")
	if err := open[0].Close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; {
		c, err := gossh.Dial("tcp", ts.addr, ts.clientConfig(ts.alice))
		if err == nil {
			_ = c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the place is not given back")
		}
	}
}

// TestKeepAlive: a client is asked when it is silent, and one that does not
// answer loses its connection.
func TestKeepAlive(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.KeepAlive = time.Second })
	dial := func(answer bool) (gossh.Conn, <-chan struct{}, <-chan struct{}) {
		c, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		conn, chans, reqs, err := gossh.NewClientConn(c, ts.addr, ts.clientConfig(ts.alice))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		go func() {
			for nc := range chans {
				_ = nc.Reject(gossh.Prohibited, "")
			}
		}()
		asked := make(chan struct{}, 100)
		go func() {
			for req := range reqs {
				if req.Type == "keepalive@openssh.com" && req.WantReply {
					asked <- struct{}{}
				}
				if answer {
					_ = req.Reply(false, nil)
				}
			}
		}()
		return conn, asked, waited(conn.Wait)
	}
	_, asked, closed := dial(true)
	_, _, deadClosed := dial(false)
	select {
	case <-deadClosed:
	case <-time.After(patience):
		t.Fatal("a dead client keeps its connection")
	}
	for range 5 {
		select {
		case <-asked:
		case <-closed:
			t.Fatal("a living client loses its connection")
		case <-time.After(patience):
			t.Fatal("a silent client is not asked")
		}
	}
}

// TestDrain: the request that is worked on is finished, idle sessions end, and
// nobody else comes in.
func TestDrain(t *testing.T) {
	ts := newTestServer(t, nil)
	started, finish := make(chan struct{}), make(chan struct{})
	ts.builder.build = func(context.Context, *Session, *BuildRequest, LogSink) (*nixproto.BuildResult, error) {
		close(started)
		<-finish
		return &nixproto.BuildResult{TimesBuilt: 1}, nil
	}
	idle, busy := ts.worker(ts.alice), ts.worker(ts.alice)
	conn := ts.dial(ts.alice)
	type answer struct {
		resp nixproto.Response
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		resp, err := busy.Do(&nixproto.BuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}}, nil)
		answered <- answer{resp, err}
	}()
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := ts.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain with a build: %v", err)
	}
	if status := idle.pipe.status(t); status != 1 {
		t.Errorf("idle session: exit status %d", status)
	}
	if s, err := conn.NewSession(); err == nil {
		_ = s.Close()
		t.Error("a session after Drain")
	}
	if c, err := net.Dial("tcp", ts.addr); err == nil {
		_ = c.Close()
		t.Error("a connection after Drain")
	}
	close(finish)
	if a := <-answered; a.err != nil || a.resp.(*nixproto.BuildResult).TimesBuilt != 1 {
		t.Errorf("the build's answer: %+v, %v", a.resp, a.err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := ts.Drain(ctx); err != nil {
		t.Error(err)
	}
}

func TestConnectionsOfOneAccount(t *testing.T) {
	ts := newTestServer(t, func(c *Config) { c.MaxConnections = 2 })
	first, second := ts.dial(ts.alice), ts.dial(ts.alice)
	third := ts.dial(ts.alice)
	_, err := third.NewSession()
	if err == nil || !strings.Contains(err.Error(), "max-connections") {
		t.Errorf("a session on a third connection: %v", err)
	}
	ts.exec(first, "nix-daemon --stdio")
	ts.exec(second, "nix-daemon --stdio")
}
