package server

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"nbd/server/adminapi"
	"nbd/store"
)

// An Admin answers `nbd admin`: JSON over HTTP on a local socket that only the
// server's own user and root may use. Every request acts at once.
type Admin struct {
	store      *store.Store
	status     func(context.Context) (adminapi.Status, error)
	disconnect func(gone func(*Client) bool)
	book       *settingsBook
	builds     buildOperator // set before Serve
	log        *slog.Logger
	http       http.Server
}

// NewAdmin returns an Admin over s; status answers for the rest of the server,
// disconnect closes the connections of clients that were removed, and book knows
// what settings amount to.
func NewAdmin(s *store.Store, book *settingsBook, status func(context.Context) (adminapi.Status, error), disconnect func(gone func(*Client) bool), log *slog.Logger) *Admin {
	a := &Admin{store: s, book: book, status: status, disconnect: disconnect, log: log}
	mux := http.NewServeMux()
	mux.Handle("GET /status", a.handle(a.getStatus))
	mux.Handle("GET /accounts", a.handle(a.listAccounts))
	mux.Handle("POST /accounts", a.handle(a.addAccount))
	mux.Handle("DELETE /accounts", a.handle(a.removeAccount))
	mux.Handle("GET /keys", a.handle(a.listKeys))
	mux.Handle("POST /keys", a.handle(a.addKeys))
	mux.Handle("DELETE /keys", a.handle(a.removeKey))
	mux.Handle("GET /settings", a.handle(a.listSettings))
	mux.Handle("POST /settings", a.handle(a.changeSetting))
	mux.Handle("POST /links", a.handle(a.link))
	mux.Handle("DELETE /links", a.handle(a.unlink))
	mux.Handle("GET /tokens", a.handle(a.listTokens))
	mux.Handle("POST /tokens", a.handle(a.addToken))
	mux.Handle("DELETE /tokens", a.handle(a.removeToken))
	mux.Handle("POST /check", a.handle(a.check))
	mux.Handle("POST /gc", a.handle(a.gc))
	a.routeBuilds(mux)
	a.http = http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return a
}

// ListenAdmin makes the socket in stateDir, mode 0600. A socket that an earlier
// server left is replaced; the store's lock tells that no other server lives.
func ListenAdmin(stateDir string) (net.Listener, error) {
	path := filepath.Join(stateDir, adminapi.Socket)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for nbd admin: %w", err)
	}
	// The socket must never be open to others, not even between bind and chmod.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen for nbd admin: %w", err)
	}
	return &peerListener{Listener: l, uid: uint32(os.Geteuid())}, nil
}

// Serve answers requests from l until Close.
func (a *Admin) Serve(l net.Listener) error {
	if err := a.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve nbd admin: %w", err)
	}
	return nil
}

// Close ends all requests and closes the listener.
func (a *Admin) Close() error { return a.http.Close() }

// A peerListener drops connections of other users than uid and root.
type peerListener struct {
	net.Listener
	uid uint32
}

// Accept returns the next connection of an allowed user.
func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c.(*net.UnixConn)); err == nil && (uid == 0 || uid == l.uid) {
			return c, nil
		}
		c.Close()
	}
}

func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

func (a *Admin) handle(f func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, adminapi.MaxBody)
		answer, err := f(r)
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			var mine *adminapi.Error
			if !errors.As(err, &mine) {
				mine = &adminapi.Error{Text: err.Error()}
				a.log.Error("nbd admin request failed", "request", r.Method+" "+r.URL.Path, "err", err)
			}
			w.WriteHeader(http.StatusBadRequest)
			answer = mine
		} else if r.Method != http.MethodGet {
			a.log.Info("nbd admin", "request", r.Method+" "+r.URL.RequestURI())
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			a.log.Debug("nbd admin client is gone", "err", err)
		}
	})
}

// adminQueue is the queue as operators see it.
func adminQueue(q QueueStatus) adminapi.Queue {
	return adminapi.Queue{Running: q.Running, Waiting: q.Waiting, Total: adminapi.Room(q.Total), Free: adminapi.Room(q.Free)}
}

func (a *Admin) getStatus(r *http.Request) (any, error) { return a.status(r.Context()) }

func (a *Admin) check(r *http.Request) (any, error) {
	return a.store.Check(r.Context(), r.URL.Query().Get("readData") == "true")
}

func (a *Admin) gc(r *http.Request) (any, error) {
	freed, err := a.store.Sweep(r.Context())
	return adminapi.Freed{Bytes: freed}, err
}

func (a *Admin) listAccounts(r *http.Request) (any, error) {
	accounts, err := a.store.Accounts(r.Context())
	if err != nil {
		return nil, err
	}
	list := []adminapi.AccountInfo{}
	for _, acc := range accounts {
		info, err := a.accountInfo(r.Context(), acc)
		if err != nil {
			return nil, err
		}
		list = append(list, info)
	}
	return list, nil
}

func (a *Admin) accountInfo(ctx context.Context, acc store.Account) (adminapi.AccountInfo, error) {
	keys, err := a.store.Keys(ctx, acc.ID)
	if err != nil {
		return adminapi.AccountInfo{}, err
	}
	info := adminapi.AccountInfo{Name: acc.Name, Created: acc.Created, PublicKey: acc.PublicKey, Keys: []adminapi.KeyInfo{}}
	for _, k := range keys {
		info.Keys = append(info.Keys, keyInfo(acc.Name, k))
	}
	return info, nil
}

func keyInfo(account string, k store.Key) adminapi.KeyInfo {
	return adminapi.KeyInfo{Account: account, Type: k.Type, Fingerprint: k.Fingerprint, Comment: k.Comment, Permissions: k.Permissions, Added: k.Added}
}

func (a *Admin) addAccount(r *http.Request) (any, error) {
	req, keys, err := readKeys(r)
	if err != nil {
		return nil, err
	}
	acc, err := a.store.AddAccount(r.Context(), req.Account, keys...)
	if err != nil {
		return nil, explainStore(err, "choose another name or key; names of removed accounts are not used again")
	}
	return a.accountInfo(r.Context(), acc)
}

func (a *Admin) removeAccount(r *http.Request) (any, error) {
	acc, err := a.account(r.Context(), r.URL.Query().Get("name"))
	if err != nil {
		return nil, err
	}
	err = a.store.RemoveAccount(r.Context(), acc.ID)
	// Also after an error: the account may be gone, and something else be left.
	a.disconnect(func(c *Client) bool { return c.Account.ID == acc.ID })
	if a.builds != nil {
		a.builds.CancelAll(acc.ID, "the operator")
	}
	return struct{}{}, err
}

func (a *Admin) account(ctx context.Context, name string) (store.Account, error) {
	acc, err := a.store.AccountByName(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return acc, &adminapi.Error{Text: fmt.Sprintf("there is no account %q", clip(name)), Hint: "see `nbd admin account list`"}
	}
	return acc, err
}

// accounts is the account of a name; if name is "", all.
func (a *Admin) accounts(ctx context.Context, name string) ([]store.Account, error) {
	if name == "" {
		return a.store.Accounts(ctx)
	}
	acc, err := a.account(ctx, name)
	return []store.Account{acc}, err
}

func (a *Admin) listKeys(r *http.Request) (any, error) {
	accounts, err := a.accounts(r.Context(), r.URL.Query().Get("account"))
	if err != nil {
		return nil, err
	}
	list := []adminapi.KeyInfo{}
	for _, acc := range accounts {
		keys, err := a.store.Keys(r.Context(), acc.ID)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			list = append(list, keyInfo(acc.Name, k))
		}
	}
	return list, nil
}

func (a *Admin) addKeys(r *http.Request) (any, error) {
	req, keys, err := readKeys(r)
	if err != nil {
		return nil, err
	}
	acc, err := a.account(r.Context(), req.Account)
	if err != nil {
		return nil, err
	}
	list := []adminapi.KeyInfo{}
	e := a.book.account(acc.ID)
	for _, k := range keys {
		if k.Permissions == nil {
			k.Permissions = permissionsOf(&e)
		}
		k, err := a.store.AddKey(r.Context(), acc.ID, k)
		if err != nil {
			return nil, explainStore(err, "a key belongs to one account; see `nbd admin key list`")
		}
		list = append(list, keyInfo(acc.Name, k))
	}
	return list, nil
}

func (a *Admin) removeKey(r *http.Request) (any, error) {
	fingerprint := r.URL.Query().Get("fingerprint")
	_, err := a.store.RemoveKey(r.Context(), fingerprint)
	if errors.Is(err, store.ErrNotFound) {
		return nil, noSuchKey(fingerprint)
	}
	if err == nil {
		a.disconnect(func(c *Client) bool { return c.Fingerprint == fingerprint })
	}
	return struct{}{}, err
}

// explainStore turns a refusal of the store into the operator's mistake.
func explainStore(err error, hint string) error {
	if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrInvalid) {
		return &adminapi.Error{Text: err.Error(), Hint: hint}
	}
	return err
}

// readKeys reads an adminapi.NewKeys request and checks everything in it.
func readKeys(r *http.Request) (adminapi.NewKeys, []store.Key, error) {
	var req adminapi.NewKeys
	if err := readJSON(r, &req); err != nil {
		return req, nil, err
	}
	for _, p := range req.Permissions {
		if !slices.Contains(allPermissions, Permission(p)) {
			return req, nil, &adminapi.Error{Text: fmt.Sprintf("there is no permission %q", clip(p)),
				Hint: fmt.Sprintf("the permissions are %v", allPermissions)}
		}
	}
	var keys []store.Key
	for _, line := range req.Keys {
		k, err := parseKey(line)
		if err != nil {
			return req, nil, err
		}
		k.Permissions = req.Permissions
		keys = append(keys, k)
	}
	return req, keys, nil
}

var allPermissions = []Permission{BuildRead, BuildWrite, StoreRead, StoreWrite, AccountRead, AccountWrite}

// dsaKey is the type of DSA keys, which no signature is accepted of.
const dsaKey = "ssh-dss"

// minRSABits is the shortest RSA key that opens an account.
const minRSABits = 2048

// parseKey reads one line of an authorized_keys file.
func parseKey(line string) (store.Key, error) {
	pub, comment, options, _, err := gossh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return store.Key{}, &adminapi.Error{Text: fmt.Sprintf("%q is not an SSH public key", clip(strings.TrimSpace(line))),
			Hint: "give a file like ~/.ssh/id_ed25519.pub, not the private key"}
	}
	if len(options) > 0 {
		return store.Key{}, &adminapi.Error{Text: "options before a key are not supported", Hint: "use --permissions to say what the key may do"}
	}
	if pub.Type() == dsaKey {
		return store.Key{}, &adminapi.Error{Text: "DSA keys are not accepted", Hint: "make one with `ssh-keygen -t ed25519`"}
	}
	if bits := rsaBits(pub); bits > 0 && bits < minRSABits {
		return store.Key{}, &adminapi.Error{Text: fmt.Sprintf("an RSA key of %d bits is not accepted", bits), Hint: "make one with `ssh-keygen -t ed25519`"}
	}
	return store.Key{Wire: pub.Marshal(), Comment: comment}, nil
}

// rsaBits returns the length of an RSA key, 0 for keys of another kind.
func rsaBits(pub gossh.PublicKey) int {
	c, ok := pub.(gossh.CryptoPublicKey)
	if !ok {
		return 0
	}
	k, ok := c.CryptoPublicKey().(*rsa.PublicKey)
	if !ok {
		return 0
	}
	return k.N.BitLen()
}
