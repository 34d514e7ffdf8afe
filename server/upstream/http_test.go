package upstream

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/vm/egress"
)

// Redirects of everything to another site, which gets no credential.
func TestRedirect(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	to, from := newTestSite(t), newTestSite(t)
	from.Config.Handler = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "" {
				w.WriteHeader(401)
				return
			}
			host := strings.TrimPrefix(to.URL, "http://")
			http.Redirect(w, r, "http://user:pass@"+host+r.URL.Path, http.StatusFound)
		})
	}(from.Config.Handler)
	tokens := tokensOf(t, "127.0.0.1=secret")
	k := c.Cache(source(t, from.URL, false), tokens)
	n, err := k.NarInfo(ctx, depPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := readNAR(ctx, k, n); err != nil {
		t.Error(err)
	}
	seen := to.requests()
	if len(seen) != 3 {
		t.Errorf("requests %q", seen)
	}
	for _, s := range seen {
		if strings.HasPrefix(s, "!") {
			t.Errorf("%s had a credential", s)
		}
	}
	absolute := *n
	absolute.URL = to.URL + "/" + n.URL
	if err := readNAR(ctx, k, &absolute); err != nil || strings.HasPrefix(to.requests()[0], "!") {
		t.Errorf("a NAR elsewhere: %v", err)
	}
}

func TestRedirectMalformed(t *testing.T) {
	ctx := context.Background()
	for name, location := range map[string]string{
		"loop": depInfo, "file": "file:///etc/passwd", "nothing": "", "host": "http:///x", "no URL": "http://%zz", "ftp": "ftp://h/x",
	} {
		c, _ := testClient(t, Config{})
		s := newTestSite(t)
		s.handle(depInfo, func(w http.ResponseWriter, _ *http.Request) {
			if location != "" {
				w.Header().Set("Location", location)
			}
			w.WriteHeader(http.StatusMovedPermanently)
		})
		_, err := c.Cache(source(t, s.URL, false), Tokens{}).NarInfo(ctx, depPath)
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(s.requests()); n > maxHops+2 {
			t.Errorf("%s: %d requests", name, n)
		}
	}
}

func TestRetry(t *testing.T) {
	ctx := context.Background()
	for _, test := range []struct {
		status, failures int
		requests         int
		ok               bool
	}{
		{500, 1, 2, true}, {503, 2, 3, true}, {503, 3, 3, false}, {429, 1, 2, true}, {408, 1, 2, true}, {400, 1, 1, false}, {404, 1, 1, false}, {403, 1, 1, false},
	} {
		c, _ := testClient(t, Config{})
		s := newTestSite(t)
		var n atomic.Int32
		s.handle(depInfo, func(w http.ResponseWriter, r *http.Request) {
			if int(n.Add(1)) <= test.failures {
				w.WriteHeader(test.status)
				return
			}
			http.ServeFile(w, r, golden+"/xz"+depInfo)
		})
		_, err := c.Cache(source(t, s.URL, false), Tokens{}).NarInfo(ctx, depPath)
		if (err == nil) != test.ok || int(n.Load()) != test.requests {
			t.Errorf("%+v: %d requests, %v", test, n.Load(), err)
		}
		if test.status/100 == 4 && test.status <= 404 && test.status > 401 && !errors.Is(err, ErrNotFound) {
			t.Errorf("%d: %v", test.status, err)
		}
	}
}

// What accounts name is not reached on this machine, redirects included, and
// what the operator names is.
func TestRule(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	s := newTestSite(t)
	strict := source(t, s.URL, false)
	strict.Rule = egress.Rule{}
	_, err := c.Cache(strict, Tokens{}).NarInfo(ctx, depPath)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "allow-addresses") {
		t.Errorf("loopback: %v", err)
	}
	if seen := s.requests(); len(seen) > 0 {
		t.Errorf("requests %q", seen)
	}
	if _, err := c.Cache(source(t, s.URL, true), Tokens{}).NarInfo(ctx, depPath); err != nil {
		t.Errorf("the operator's: %v", err)
	}
	// What one account was refused, another may reach.
	if _, err := c.Cache(source(t, s.URL, false), Tokens{}).NarInfo(ctx, depPath); err != nil {
		t.Errorf("by another rule: %v", err)
	}
	s.requests()
	if _, err := c.Cache(strict, Tokens{}).NarInfo(ctx, depPath); !errors.Is(err, ErrUnavailable) || len(s.requests()) > 0 {
		t.Errorf("loopback again: %v", err)
	}
	// A site that the operator listed leads to one that he did not.
	listed := newTestSite(t)
	rule, err := egress.ParseRule([]string{strings.TrimPrefix(listed.URL, "http://")})
	if err != nil {
		t.Fatal(err)
	}
	listed.handle(depInfo, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, s.URL+depInfo, http.StatusFound)
	})
	s.requests()
	to := source(t, listed.URL, false)
	to.Rule = rule
	k := c.Cache(to, Tokens{})
	var refused *egress.RefusedError
	if _, err := k.NarInfo(ctx, depPath); !errors.As(err, &refused) || len(s.requests()) > 0 {
		t.Errorf("redirect to loopback: %v", err)
	}
	if _, err := k.NarInfo(ctx, absent); !errors.Is(err, ErrNotFound) {
		t.Errorf("the cache itself: %v", err)
	}
	if _, err := k.Open(ctx, &nixproto.NarInfo{URL: s.URL + "/x", Compression: "none"}); !errors.As(err, &refused) {
		t.Errorf("NAR on loopback: %v", err)
	}
}

// nameServer answers each question for an address in turn: a public one that
// is not there, then this machine.
func nameServer(t *testing.T, answers ...netip.Addr) *net.Resolver {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	go func() {
		for buf := make([]byte, 512); ; {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q := buf[:n]
			end := 12 + bytes.IndexByte(q[12:], 0) + 5
			reply := append([]byte(nil), q[:end]...)
			binary.BigEndian.PutUint16(reply[2:], 0x8180)
			binary.BigEndian.PutUint16(reply[10:], 0) // no additional records
			if q[end-3] == 1 {                        // type A
				binary.BigEndian.PutUint16(reply[6:], 1)
				ip := answers[0].As4()
				if len(answers) > 1 {
					answers = answers[1:]
				}
				reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
				reply = append(reply, ip[:]...)
			}
			_, _ = pc.WriteTo(reply, from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
}

// A name that resolves to this machine the second time gains nothing.
// What an account is told of a cache that does not answer says nothing of the
// network that the server is in.
func TestUnansweredTellsNothingOfTheHost(t *testing.T) {
	here, there := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 4711}, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 80}
	tests := []struct {
		err  error
		want string
	}{
		{&net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "cache", Server: "192.0.2.3:53"}},
			"no answer: http://cache/x: cannot resolve cache: no such host"},
		{&net.OpError{Op: "read", Net: "tcp", Source: here, Addr: there, Err: syscall.ECONNRESET},
			"no answer: http://cache/x: read: connection reset by peer"},
		{&net.OpError{Op: "dial", Net: "tcp", Addr: there, Err: syscall.ECONNREFUSED},
			"no answer: http://cache/x: dial: connection refused"},
	}
	for _, tt := range tests {
		_, err := unanswered(t.Context(), &url.URL{Scheme: "http", Host: "cache", Path: "/x"}, tt.err)
		if err.Error() != tt.want || !errors.Is(err, errUnreachable) {
			t.Errorf("%v is told as %q, want %q", tt.err, err, tt.want)
		}
	}
}

func TestRebinding(t *testing.T) {
	s := newTestSite(t)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	resolver := nameServer(t, netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("127.0.0.1"))
	dialed := []string{}
	transport := newTransport(timing{connect: time.Second, headers: time.Second}, func(host string) *net.Dialer {
		d := egress.Rule{}.Dialer(host)
		d.Resolver = resolver
		control := d.Control
		d.Control = nil
		d.ControlContext = func(_ context.Context, network, address string, c syscall.RawConn) error {
			dialed = append(dialed, address)
			if err := control(network, address, c); err != nil {
				return err
			}
			return errors.New("a public address: not dialed in a test")
		}
		return d
	})
	for range 2 {
		_, err = transport.DialContext(context.Background(), "tcp", net.JoinHostPort("rebind.example", port))
	}
	var refused *egress.RefusedError
	if !errors.As(err, &refused) || len(dialed) != 2 || !strings.HasPrefix(dialed[0], "8.8.8.8:") || len(s.requests()) > 0 {
		t.Errorf("dialed %q: %v", dialed, err)
	}
}

// fast are limits for tests of what is slow.
var fast = timing{connect: time.Second, headers: 100 * time.Millisecond, document: 300 * time.Millisecond, stall: 150 * time.Millisecond}

func TestSlow(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{t: fast})
	s := newTestSite(t)
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	trickle := func(w http.ResponseWriter, r *http.Request) {
		for {
			select {
			case <-end:
				return
			case <-r.Context().Done():
				return
			case <-time.After(20 * time.Millisecond):
				if _, err := io.WriteString(w, "x"); err != nil {
					return
				}
				_ = http.NewResponseController(w).Flush()
			}
		}
	}
	s.handle("/slow/nix-cache-info", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	s.handle("/trickle/nix-cache-info", trickle)
	s.handle("/nar/slow", trickle)
	for _, path := range []string{"/slow", "/trickle"} {
		start := time.Now()
		_, err := c.Cache(source(t, s.URL+path, false), Tokens{}).Info(ctx)
		if !errors.Is(err, ErrUnavailable) || time.Since(start) > 5*time.Second {
			t.Errorf("%s: %v after %v", path, err, time.Since(start))
		}
	}
	k := c.Cache(source(t, s.URL, false), Tokens{})
	err := readNAR(ctx, k, &nixproto.NarInfo{URL: "nar/slow", Compression: "none", PathInfo: nixproto.PathInfo{NarSize: 1 << 20}})
	if !errors.Is(err, errStalled) || !Unreachable(err) {
		t.Errorf("slow NAR: %v", err)
	}
}

// A reader that takes its time is not a cache that stalls.
func TestSlowReader(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{t: fast})
	k := c.Cache(source(t, newTestSite(t).URL, false), Tokens{})
	n, err := k.NarInfo(ctx, depPath)
	if err != nil {
		t.Fatal(err)
	}
	r, err := k.Open(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	time.Sleep(2 * fast.stall) // nothing happens, which is what is tested
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Error(err)
	}
}

func TestBadNAR(t *testing.T) {
	ctx := context.Background()
	c, _ := testClient(t, Config{})
	s := newTestSite(t)
	k := c.Cache(source(t, s.URL, false), Tokens{})
	n, err := k.NarInfo(ctx, depPath)
	if err != nil {
		t.Fatal(err)
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	if _, err := z.Write(make([]byte, 32<<20)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	endless := func(w http.ResponseWriter, _ *http.Request) {
		for block := make([]byte, 64<<10); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
	send := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }
	}
	for name, test := range map[string]struct {
		handler      http.HandlerFunc
		compression  string
		size, file   uint64
		wantMalforms bool
	}{
		"gzip bomb":           {send(bomb.Bytes()), "gzip", 1568, 0, true},
		"endless":             {endless, "none", 1568, 0, true},
		"endless zeros of xz": {endless, "xz", 1568, 0, true},
		"longer file":         {send(bomb.Bytes()), "gzip", 32 << 20, 100, true},
		"truncated":           {send(bomb.Bytes()[:1000]), "gzip", 32 << 20, 0, true},
		"cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "2000")
			_, _ = w.Write(make([]byte, 1000))
		}, "none", 2000, 0, false},
		"short":               {send(make([]byte, 1000)), "none", 2000, 0, false},
		"unknown compression": {send(nil), "lzip", 2000, 0, true},
		"not gzip":            {send([]byte("x")), "gzip", 2000, 0, true},
		"not zstd":            {send([]byte("xxxxxxxx")), "zstd", 2000, 0, true},
		"not bzip2":           {send([]byte("x")), "bzip2", 2000, 0, true},
		"not br":              {send([]byte("\xff\xff\xff")), "br", 2000, 0, true},
		"encoded unknown": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "x")
		}, "none", 2000, 0, true},
	} {
		s.handle("/nar/x", test.handler)
		bad := *n
		bad.URL, bad.Compression, bad.NarSize, bad.FileSize = "nar/x", test.compression, test.size, test.file
		err := readNAR(ctx, k, &bad)
		if err == nil || errors.Is(err, ErrMalformed) != test.wantMalforms {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is encoded for the transport is decoded.
	s.handle("/nar/x", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(bomb.Bytes())
	})
	encoded := *n
	encoded.URL, encoded.Compression, encoded.NarSize, encoded.FileSize = "nar/x", "none", 32<<20, 0
	encoded.NarHash = nixproto.SumSHA256(make([]byte, 32<<20))
	if err := readNAR(ctx, k, &encoded); err != nil {
		t.Errorf("encoded: %v", err)
	}
}

func TestFolder(t *testing.T) {
	ctx := context.Background()
	for _, ref := range []string{"../x", "/etc/passwd", "nar", "nar/../../x", ""} {
		if b, err := folder(golden+"/xz").get(ctx, ref); err == nil {
			b.Close()
			t.Errorf("%q opens", ref)
		}
	}
	if _, err := folder(golden).get(ctx, "absent"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	c, _ := testClient(t, Config{})
	if _, err := c.Cache(source(t, "file:///nonexistent", true), Tokens{}).Info(ctx); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}
