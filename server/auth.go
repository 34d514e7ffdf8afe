package server

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

// A Permission is what a key may do; it is spelled as operators spell it.
type Permission string

// The permissions. One on the store without one on builds makes a pure cache
// credential.
const (
	BuildRead    Permission = "build:read"
	BuildWrite   Permission = "build:write"
	StoreRead    Permission = "store:read"
	StoreWrite   Permission = "store:write"
	AccountRead  Permission = "account:read"
	AccountWrite Permission = "account:write"
)

// A Client is who is at the other end of a connection: one key, or one token, of
// one account. It does not change.
type Client struct {
	Account     store.Account
	Fingerprint string   // of the key: "SHA256:…"; "" if it came with a token
	Permissions []string // of the key or token

	// Token identifies the token; "" if it came with a key. TokenName and
	// Expires are the token's; it does not expire if Expires is zero.
	Token, TokenName string
	Expires          time.Time
}

// who names the key or token.
func (c *Client) who() string {
	if c.Token != "" {
		return "token " + c.TokenName
	}
	return "key " + c.Fingerprint
}

// Can reports whether the client's key or token has a permission.
func (c *Client) Can(p Permission) bool { return slices.Contains(c.Permissions, string(p)) }

// require returns an error that names the permission which is missing.
func (c *Client) require(p Permission) error {
	if c.Can(p) {
		return nil
	}
	return refusef("permission denied: %s does not have %s", c.who(), p)
}

// accounts knows who may come in; *store.Store. AccountByKey returns
// store.ErrNotFound for a key that nobody has, AccountByToken for what is no
// token now.
type accounts interface {
	AccountByKey(ctx context.Context, wire []byte) (store.Account, store.Key, error)
	AccountByToken(ctx context.Context, secret string) (store.Account, store.Token, error)
}

// clientExtra is where a connection's permissions hold its *Client.
type clientExtra struct{}

// authenticator decides which keys open a connection. Any user name will do: the
// key alone tells who it is. But for one: who connects as tokenUser needs no key,
// and is nobody until the session that runs a command has brought a token.
type authenticator struct {
	unknown  damper
	accounts accounts
	log      *slog.Logger
}

// known reports whether a key that a client offers would be accepted; the
// client has not proved yet that it is its own.
func (a *authenticator) known(ctx ssh.Context, key ssh.PublicKey) bool {
	_, _, err := a.accounts.AccountByKey(ctx, key.Marshal())
	log := a.log.With("client", ctx.RemoteAddr(), "key", gossh.FingerprintSHA256(key), "user", clip(ctx.User()))
	switch {
	case errors.Is(err, store.ErrNotFound):
		if ok, dropped := a.unknown.pass(time.Now()); ok {
			log.Info("unknown key refused", "not_logged_before", dropped)
		}
	case err != nil:
		log.Error("cannot look up key", "err", err)
	}
	return err == nil
}

// verified names the client whose signature by key was just verified, and
// calls found with it. The permissions it returns are the connection's own:
// what was offered before, and not used, leaves no trace in them.
func (a *authenticator) verified(key gossh.PublicKey, found func(*Client)) (*gossh.Permissions, error) {
	ctx, wire := context.Background(), key.Marshal()
	account, k, err := a.accounts.AccountByKey(ctx, wire)
	if err != nil {
		return nil, err
	}
	c := &Client{Account: account, Fingerprint: k.Fingerprint, Permissions: k.Permissions}
	found(c)
	// Who removed the key closed the connections that found knew then.
	if _, _, err := a.accounts.AccountByKey(ctx, wire); err != nil {
		return nil, err
	}
	return &gossh.Permissions{ExtraData: map[any]any{clientExtra{}: c}}, nil
}

// tokenUser is the name of SSH users who come with a token.
const tokenUser = "authtoken"

// none answers the authentication method of that name, which asks for no proof.
func (a *authenticator) none(user string) error {
	if user == tokenUser {
		return nil
	}
	return errors.New("a key is needed")
}

// errToken is the one answer to a token that does not open anything.
var errToken = refusef("this token is not valid: it is unknown, was revoked or has expired")

// token names the client that brought a token, and calls found with it, which may
// refuse it.
func (a *authenticator) token(ctx context.Context, secret string, found func(*Client) error) (*Client, error) {
	account, t, err := a.accounts.AccountByToken(ctx, secret)
	if errors.Is(err, store.ErrNotFound) {
		return nil, errToken
	} else if err != nil {
		return nil, err
	}
	c := &Client{Account: account, Permissions: t.Permissions, Token: t.ID, TokenName: t.Name, Expires: t.Expires}
	if err := found(c); err != nil {
		return nil, err
	}
	// As in verified.
	if _, _, err := a.accounts.AccountByToken(ctx, secret); errors.Is(err, store.ErrNotFound) {
		return nil, errToken
	} else if err != nil {
		return nil, err
	}
	return c, nil
}

// clientOf returns whom a connection authenticated as, nil if nobody.
func clientOf(conn *gossh.ServerConn) *Client {
	if conn.Permissions == nil {
		return nil
	}
	c, _ := conn.Permissions.ExtraData[clientExtra{}].(*Client)
	return c
}
