package server

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
)

// TestRemovalEndsConnections: a key, and all of an account, is shut out at once,
// also where it is inside already. Others stay.
func TestRemovalEndsConnections(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := NewAdmin(ts.store, ts.book, nil, ts.Disconnect, slog.New(slog.DiscardHandler))
	second, bob := ts.addKey("store:read"), newKey(t)
	ts.addAccount("bob", bob, nil)
	first, other, stranger := ts.worker(ts.alice), ts.worker(second), ts.worker(bob)
	remove := func(path, name, value string) {
		t.Helper()
		w := httptest.NewRecorder()
		admin.http.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodDelete, path+"?"+url.Values{name: {value}}.Encode(), nil))
		if w.Code != http.StatusOK {
			t.Fatalf("%s: %s", path, w.Body)
		}
	}
	ask := func(w *workerClient) error {
		_, err := w.Do(&nixproto.QueryAllValidPaths{}, nil)
		return err
	}
	remove("/keys", "fingerprint", gossh.FingerprintSHA256(second.PublicKey()))
	if ask(other) == nil {
		t.Error("a removed key is still served")
	}
	if err := ask(first); err != nil {
		t.Errorf("another key of the account: %v", err)
	}
	remove("/accounts", "name", "alice")
	if ask(first) == nil {
		t.Error("a removed account is still served")
	}
	if err := ask(stranger); err != nil {
		t.Errorf("another account: %v", err)
	}
}
