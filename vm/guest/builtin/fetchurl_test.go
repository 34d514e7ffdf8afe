package builtin

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ulikunitz/xz"

	"nbd/nixproto/nar"
)

// A site is a web server and what fetches from it.
type site struct {
	*httptest.Server
	t      *testing.T
	ca     string
	asked  []string        // method, path and range of each request
	waited []time.Duration // between tries
}

func newSite(t *testing.T, tls bool, serve http.HandlerFunc) *site {
	t.Helper()
	s := &site{t: t, ca: filepath.Join(t.TempDir(), "ca")}
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Range")))
		serve(w, r)
	})
	if tls {
		s.Server = httptest.NewTLSServer(h)
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		if err := os.WriteFile(s.ca, text, 0o644); err != nil {
			t.Fatal(err)
		}
	} else {
		s.Server = httptest.NewServer(h)
	}
	t.Cleanup(s.Close)
	return s
}

// fetch runs builtin:fetchurl; URLs begin with SITE. It returns what was made and
// the log.
func (s *site) fetch(attrs ...string) (made []string, log string) {
	s.t.Helper()
	top := s.t.TempDir()
	s.t.Chdir(s.t.TempDir())
	for i := range attrs {
		attrs[i] = strings.ReplaceAll(attrs[i], "SITE", s.URL)
	}
	o := orderOf("fetchurl", filepath.Join(top, "out"), attrs...)
	o.Fixed = true
	var b strings.Builder
	f := newFetcher(&logger{&b}, s.ca)
	f.wait = func(_ context.Context, d time.Duration) error { s.waited = append(s.waited, d); return nil }
	if err := f.run(s.t.Context(), o); err != nil {
		b.WriteString(report(err))
	} else {
		made = tree(s.t, top)
	}
	if left := tree(s.t, "."); len(left) > 0 {
		s.t.Errorf("left in the build directory: %q", left)
	}
	return made, strings.NewReplacer(s.URL, "SITE", top, "").Replace(b.String())
}

func (s *site) wantRequests(want ...string) {
	s.t.Helper()
	if diff := cmp.Diff(want, s.asked); diff != "" {
		s.t.Error(diff)
	}
}

// failure is what is logged when a download to a file fails.
func failure(text string) string {
	return red + "error:" + plain + "\n       … writing file " + magenta + `"/out"` + plain + "\n\n       " + red + "error:" + plain + " " +
		strings.NewReplacer("<", magenta, ">", plain).Replace(text) + "\n"
}

func TestFetch(t *testing.T) {
	s := newSite(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/from":
			http.Redirect(w, r, "/to?a=b", http.StatusFound)
		case "/secret":
			user, password, _ := r.BasicAuth()
			fmt.Fprint(w, user, password)
		default:
			fmt.Fprint(w, "text")
		}
	})
	for _, tt := range []struct {
		attrs []string
		want  string
	}{
		{[]string{"url", "SITE/x y"}, "out text"},
		{[]string{"url", "SITE/from", "executable", "1"}, "out* text"},
		{[]string{"url", strings.Replace(s.URL, "//", "//me:pass@", 1) + "/secret", "unpack", ""}, "out mepass"},
	} {
		made, log := s.fetch(tt.attrs...)
		if diff := cmp.Diff([]string{tt.want}, made); diff != "" || log != "" {
			t.Errorf("%s\n%q", diff, log)
		}
	}
	s.wantRequests("GET /x%20y", "GET /from", "GET /to?a=b", "GET /secret")
}

func TestFetchFile(t *testing.T) {
	s := newSite(t, false, http.NotFound)
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("local"), 0o644); err != nil {
		t.Fatal(err)
	}
	made, log := s.fetch("url", "file://"+file)
	if diff := cmp.Diff([]string{"out local"}, made); diff != "" || log != "" {
		t.Errorf("%s\n%q", diff, log)
	}
	_, log = s.fetch("url", "file:///nix/nothing")
	if want := failure("unable to download '<file:///nix/nothing>': Could not open file /nix/nothing: No such file or directory"); log != want {
		t.Errorf("%q, not\n%q", log, want)
	}
	// What a server says does not lead to files.
	s = newSite(t, false, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "file://"+file, http.StatusFound) })
	made, log = s.fetch("url", "SITE/x")
	if want := failure("unable to download '<SITE/x>': Unsupported protocol"); made != nil || log != want {
		t.Errorf("made %q: %q, not\n%q", made, log, want)
	}
	s.wantRequests("GET /x")
}

// Some servers pack what they have by whatever they like. Nix's curl unpacks some
// of that; to take it as the file would be to make another one.
func TestFetchPacked(t *testing.T) {
	s := newSite(t, false, func(w http.ResponseWriter, r *http.Request) {
		coding := r.URL.Path[1:]
		w.Header().Set("Content-Encoding", coding)
		if coding != "gzip" {
			fmt.Fprint(w, "text")
			return
		}
		z := gzip.NewWriter(w)
		fmt.Fprint(z, "text")
		z.Close()
	})
	for _, coding := range []string{"gzip", "identity"} {
		made, log := s.fetch("url", "SITE/"+coding)
		if diff := cmp.Diff([]string{"out text"}, made); diff != "" || log != "" {
			t.Errorf("%s: %s\n%q", coding, diff, log)
		}
	}
	made, log := s.fetch("url", "SITE/br")
	if want := failure("unable to download '<SITE/br>': the server sends it packed by 'br', which was not asked for"); made != nil || log != want {
		t.Errorf("made %q: %q, not\n%q", made, log, want)
	}
	s.wantRequests("GET /gzip", "GET /identity", "GET /br")
}

func TestFetchRefusals(t *testing.T) {
	s := newSite(t, false, http.NotFound)
	for _, tt := range []struct{ url, want string }{
		{"nonsense", "URL '<nonsense>' doesn't have a scheme"},
		{"http://[", "'<http://[>' is not a valid URL: <missing ']' in host>"},
		{"gopher://x/y", "unable to download '<gopher://x/y>': Unsupported protocol"},
		{"https://127.0.0.1:1/", "unable to download '<https://127.0.0.1:1/>': this server has no certificates of authorities, so nobody can be trusted by https"},
		{"SITE/x", "unable to download '<SITE/x>': HTTP error <404>\n\n       response body:\n\n       404 page not found"},
	} {
		if made, log := s.fetch("url", tt.url); made != nil || log != failure(tt.want) {
			t.Errorf("%s: %q, not\n%q", tt.url, log, failure(tt.want))
		}
	}
	s.wantRequests("GET /x")
	if len(s.waited) > 0 {
		t.Errorf("waited %v", s.waited)
	}
	o := orderOf("fetchurl", "out", "url", s.URL)
	var log strings.Builder
	if status := Run(t.Context(), o, &log); status != 1 || log.String() != message("'builtin:fetchurl' must be a fixed-output or impure derivation") {
		t.Errorf("status %d, log %q", status, log.String())
	}
	if _, log := s.fetch("name", "x"); log != message("attribute '<url>' missing") {
		t.Error(log)
	}
}

func TestFetchTriesAgain(t *testing.T) {
	tries := 0
	s := newSite(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch tries++; {
		case r.URL.Path == "/busy" && tries == 1:
			http.Error(w, "", http.StatusTooManyRequests)
		case r.URL.Path != "/never" && tries == 3:
			fmt.Fprint(w, "text")
		default:
			http.Error(w, "<html>later", http.StatusServiceUnavailable)
		}
	})
	made, log := s.fetch("url", "SITE/third")
	if diff := cmp.Diff([]string{"out text"}, made); diff != "" {
		t.Errorf("%s\n%s", diff, log)
	}
	lines := strings.Split(strings.TrimSpace(log), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[1], `@nix {"action":"msg","level":1,"msg":"\u001b[35;1mwarning:\u001b[0m unable to download '\u001b[35;1mSITE/third\u001b[0m': HTTP error \u001b[35;1m503\u001b[0m`) ||
		!strings.HasSuffix(lines[1], fmt.Sprintf(`retrying in %d ms (attempt 2/5)"}`, s.waited[1].Milliseconds())) {
		t.Errorf("%q", lines)
	}
	tries = 0
	s.fetch("url", "SITE/busy")
	tries = 0
	if made, log := s.fetch("url", "SITE/never"); made != nil || tries != 5 || !strings.Contains(log, "HTTP error") {
		t.Errorf("%d tries, made %q: %s", tries, made, log)
	}
	least := []time.Duration{250, 500, 60000, 500, 250, 500, 1000, 2000}
	if len(s.waited) != len(least) {
		t.Fatalf("waited %v", s.waited)
	}
	for i, d := range s.waited {
		if min := least[i] * time.Millisecond; d < min || d > min*3/2 {
			t.Errorf("%d: waited %v, not from %v to half as long again", i, d, min)
		}
	}
}

func TestFetchGoesOn(t *testing.T) {
	const text = "one half and the other"
	for _, ranges := range []string{"bytes", "none"} {
		t.Run(ranges, func(t *testing.T) {
			s := newSite(t, false, nil)
			s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.Header.Get("Range")))
				w.Header().Set("Accept-Ranges", ranges)
				if r.Header.Get("Range") != "" {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes 8-%d/%d", len(text)-1, len(text)))
					w.WriteHeader(http.StatusPartialContent)
					fmt.Fprint(w, text[8:])
					return
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(text)))
				fmt.Fprint(w, text[:8])
			})
			made, log := s.fetch("url", "SITE/x")
			if ranges == "none" {
				s.wantRequests("GET")
				if made != nil || !strings.Contains(log, "unexpected EOF") {
					t.Errorf("made %q: %s", made, log)
				}
				return
			}
			s.wantRequests("GET", "GET bytes=8-")
			if diff := cmp.Diff([]string{"out " + text}, made); diff != "" || !strings.Contains(log, "retrying from offset 8 in") {
				t.Errorf("%s\n%s", diff, log)
			}
		})
	}
}

func TestFetchRedirects(t *testing.T) {
	s := newSite(t, false, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Path+"x", http.StatusMovedPermanently)
	})
	made, log := s.fetch("url", "SITE/")
	if want := failure("unable to download '<SITE/>': more than 10 redirects"); made != nil || log != want {
		t.Errorf("made %q: %q, not\n%q", made, log, want)
	}
	if len(s.asked) != 11 {
		t.Errorf("%d requests", len(s.asked))
	}
}

func TestFetchTLS(t *testing.T) {
	s := newSite(t, true, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "secure") })
	made, log := s.fetch("url", "SITE/x")
	if diff := cmp.Diff([]string{"out secure"}, made); diff != "" || log != "" {
		t.Errorf("%s\n%s", diff, log)
	}
	for _, tt := range []struct {
		pem  []byte
		want string
	}{
		{[]byte("no certificate"), "no certificates of authorities"},
		{otherAuthority(t), "certificate signed by unknown authority"},
	} {
		if err := os.WriteFile(s.ca, tt.pem, 0o644); err != nil {
			t.Fatal(err)
		}
		if made, log := s.fetch("url", "SITE/x"); made != nil || !strings.Contains(log, tt.want) {
			t.Errorf("made %q: %s", made, log)
		}
	}
	s.wantRequests("GET /x")
	if len(s.waited) > 0 {
		t.Errorf("waited %v", s.waited)
	}
}

// otherAuthority is the certificate of an authority that signed nothing.
func otherAuthority(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// archive is one with everything in it, and its tree.
func archive(t *testing.T) ([]byte, []string) {
	t.Helper()
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	for _, step := range []error{
		w.Directory(""), w.Directory("d"), w.File("f", true, 1), write(w, "x"), w.Symlink("l", "../e"), w.EndDirectory(),
		w.File("e", false, 0), w.EndDirectory(), w.Close(),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	return b.Bytes(), []string{"out/", "out/d/", "out/d/f* x", "out/d/l -> ../e", "out/e "}
}

func write(w *nar.Writer, text string) error {
	_, err := w.Write([]byte(text))
	return err
}

func TestFetchUnpacks(t *testing.T) {
	whole, want := archive(t)
	var packed bytes.Buffer
	z, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(whole); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s := newSite(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/whole.nar", "/named.xz":
			w.Write(whole)
		case "/more.nar":
			w.Write(append(whole[:len(whole):len(whole)], "more"...))
		case "/half.nar":
			w.Write(whole[:len(whole)/2])
		case "/packed.nar.xz":
			w.Write(packed.Bytes())
		case "/half.nar.xz":
			w.Write(packed.Bytes()[:packed.Len()/2])
		}
	})
	for _, tt := range []struct{ path, err string }{
		{"/whole.nar", ""}, {"/more.nar", ""}, {"/packed.nar.xz", ""},
		{"/half.nar", "bad archive:"}, {"/empty", "bad archive:"},
		{"/named.xz", "failed to read compressed data"}, {"/half.nar.xz", "failed to read compressed data"},
	} {
		made, log := s.fetch("url", "SITE"+tt.path, "unpack", "1")
		if tt.err != "" {
			if made != nil || !strings.Contains(log, tt.err) {
				t.Errorf("%s: made %q, %s", tt.path, made, log)
			}
		} else if diff := cmp.Diff(want, made); diff != "" || log != "" {
			t.Errorf("%s: %s\n%s", tt.path, diff, log)
		}
	}
}
