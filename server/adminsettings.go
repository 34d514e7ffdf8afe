package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"nbd/server/adminapi"
	"nbd/server/settings"
	"nbd/store"
)

// settingsHint goes with mistakes in a setting.
const settingsHint = "`nbd admin settings --help` lists them all"

// settingsOwner finds whose settings are meant.
func (a *Admin) settingsOwner(ctx context.Context, o adminapi.SettingsOwner) (store.SettingsOwner, error) {
	if o.Account == "" && o.Key == "" {
		return store.SettingsOwner{}, nil
	}
	accounts, err := a.accounts(ctx, o.Account)
	if err != nil {
		return store.SettingsOwner{}, err
	}
	if o.Key == "" {
		return store.SettingsOwner{Account: accounts[0].ID}, nil
	}
	for _, acc := range accounts {
		keys, err := a.store.Keys(ctx, acc.ID)
		if err != nil {
			return store.SettingsOwner{}, err
		}
		if slices.ContainsFunc(keys, func(k store.Key) bool { return k.Fingerprint == o.Key }) {
			return store.SettingsOwner{Account: acc.ID, Key: o.Key}, nil
		}
	}
	return store.SettingsOwner{}, noSuchKey(o.Key)
}

func noSuchKey(fingerprint string) error {
	return &adminapi.Error{Text: fmt.Sprintf("there is no key %q", clip(fingerprint)),
		Hint: "give the fingerprint, SHA256:…, as `nbd admin key list` prints it"}
}

// listSettings tells all settings of an owner, or the one that is named.
func (a *Admin) listSettings(r *http.Request) (any, error) {
	q := r.URL.Query()
	o, err := a.settingsOwner(r.Context(), adminapi.SettingsOwner{Account: q.Get("account"), Key: q.Get("key")})
	if err != nil {
		return nil, err
	}
	list := []adminapi.Setting{}
	for _, s := range settings.All() {
		if name := q.Get("name"); name == "" || name == s.Name {
			list = append(list, a.setting(o, &s))
		}
	}
	if len(list) == 0 {
		return nil, &adminapi.Error{Text: fmt.Sprintf("there is no setting %q", clip(q.Get("name"))), Hint: settingsHint}
	}
	return list, nil
}

// effective returns what counts for an owner.
func (a *Admin) effective(o store.SettingsOwner) settings.Effective {
	if o.Account == 0 {
		return a.book.systemSettings()
	}
	return a.book.client(o.Account, o.Key)
}

func (a *Admin) setting(o store.SettingsOwner, s *settings.Setting) adminapi.Setting {
	e := a.effective(o)
	text := e.Show(s)
	if s.Name == signingKeySetting && text == "" && o.Account != 0 {
		if acc := a.store.Settings().Accounts[o.Account]; acc != nil {
			text, _, _ = strings.Cut(acc.Account.PublicKey, ":")
		}
	}
	origin := e.Origin(s.Name)
	return adminapi.Setting{Name: s.Name, Value: e.JSON(s), Text: text, Origin: origin.String()}
}

// settingOps are the operations by their names.
var settingOps = map[string]settings.Op{"set": settings.Set, "add": settings.Add, "remove": settings.Remove, "reset": settings.Reset}

func (a *Admin) changeSetting(r *http.Request) (any, error) {
	var req adminapi.SettingChange
	if err := readJSON(r, &req); err != nil {
		return nil, err
	}
	op, ok := settingOps[req.Op]
	if !ok {
		return nil, &adminapi.Error{Text: fmt.Sprintf("there is no operation %q", clip(req.Op))}
	}
	o, err := a.settingsOwner(r.Context(), req.SettingsOwner)
	if err != nil {
		return nil, err
	}
	change := settings.Change{Name: req.Name, Op: op, Value: req.Value, Operator: true}
	if err := a.book.change(r.Context(), o, change); err != nil {
		return nil, settingsMistake(err)
	}
	s, _ := settings.Lookup(req.Name) // Edit has found it
	return a.setting(o, s), nil
}

// settingsMistake makes a refusal the operator's own mistake.
func settingsMistake(err error) error {
	var refused *refusal
	if errors.As(err, &refused) {
		return &adminapi.Error{Text: refused.msg, Hint: settingsHint}
	}
	return err
}

// change changes what is stored for an owner. Its error is a refusal if the
// change cannot be.
func (b *settingsBook) change(ctx context.Context, o store.SettingsOwner, c settings.Change) error {
	return b.changes(ctx, []store.SettingsOwner{o}, []settings.Change{c})
}

// changes makes one change for each owner, all or none.
func (b *settingsBook) changes(ctx context.Context, owners []store.SettingsOwner, changes []settings.Change) error {
	return b.stored.ChangeSettings(ctx, owners, func(values []map[string]string) error {
		for i, o := range owners {
			level, inherited := settings.System, settings.Defaults()
			switch {
			case o.Key != "":
				level, inherited = settings.Key, b.account(o.Account)
			case o.Account != 0:
				level, inherited = settings.Account, b.systemSettings()
			default:
				inherited = b.with(inherited, settings.Layer{Level: settings.System, Values: b.system})
			}
			if err := b.checkOwnKey(o, changes[i]); err != nil {
				return err
			}
			edited, err := settings.Edit(values[i], inherited, level, changes[i])
			if err != nil {
				return refusef("%v", err)
			}
			clear(values[i])
			maps.Copy(values[i], edited)
		}
		return nil
	})
}

// checkOwnKey refuses a signing key that is not the account's.
func (b *settingsBook) checkOwnKey(o store.SettingsOwner, c settings.Change) error {
	if c.Name != signingKeySetting || c.Op != settings.Set || c.Value == "" {
		return nil
	}
	own := ""
	if acc := b.stored.Settings().Accounts[o.Account]; acc != nil {
		own, _, _ = strings.Cut(acc.Account.PublicKey, ":")
	}
	if c.Value != own {
		return refusef("setting %s is %q, and the account has the key %s only", c.Name, clip(printable(c.Value)), own)
	}
	return nil
}

// trustedAccounts is the setting by which accounts see each other's paths.
const trustedAccounts = "trusted-accounts"

// link records the consent of both accounts; unlink takes back both.
func (a *Admin) link(r *http.Request) (any, error) {
	var req adminapi.Link
	if err := readJSON(r, &req); err != nil {
		return nil, err
	}
	return req, a.relink(r.Context(), req, settings.Add)
}

func (a *Admin) unlink(r *http.Request) (any, error) {
	req := adminapi.Link{A: r.URL.Query().Get("a"), B: r.URL.Query().Get("b")}
	return req, a.relink(r.Context(), req, settings.Remove)
}

// relink changes both sides of a link, or neither.
func (a *Admin) relink(ctx context.Context, l adminapi.Link, op settings.Op) error {
	if l.A == l.B {
		return &adminapi.Error{Text: "an account cannot be linked with itself", Hint: "name two accounts"}
	}
	var owners []store.SettingsOwner
	var changes []settings.Change
	for _, side := range [][2]string{{l.A, l.B}, {l.B, l.A}} {
		acc, err := a.account(ctx, side[0])
		if err != nil {
			return err
		}
		e := a.book.account(acc.ID)
		if has := slices.Contains(e.TrustedAccounts, side[1]); op == settings.Remove && !has {
			continue // one side may have taken its word back itself
		}
		owners = append(owners, store.SettingsOwner{Account: acc.ID})
		changes = append(changes, settings.Change{Name: trustedAccounts, Op: op, Value: side[1], Operator: true})
	}
	if len(owners) == 0 {
		return &adminapi.Error{Text: fmt.Sprintf("accounts %s and %s are not linked", l.A, l.B)}
	}
	return settingsMistake(a.book.changes(ctx, owners, changes))
}

// permissionsOf returns what a key or token may do that is added without its
// being said; not nil, which would mean all.
func permissionsOf(e *settings.Effective) []string {
	return append([]string{}, e.DefaultPermissions...)
}

func tokenInfo(account string, t store.Token) adminapi.TokenInfo {
	return adminapi.TokenInfo{Account: account, Name: t.Name, Permissions: t.Permissions, Created: t.Created, Expires: t.Expires}
}

func (a *Admin) listTokens(r *http.Request) (any, error) {
	accounts, err := a.accounts(r.Context(), r.URL.Query().Get("account"))
	if err != nil {
		return nil, err
	}
	list := []adminapi.TokenInfo{}
	for _, acc := range accounts {
		tokens, err := a.store.Tokens(r.Context(), acc.ID)
		if err != nil {
			return nil, err
		}
		for _, t := range tokens {
			list = append(list, tokenInfo(acc.Name, t))
		}
	}
	return list, nil
}

func (a *Admin) addToken(r *http.Request) (any, error) {
	var req adminapi.NewToken
	if err := readJSON(r, &req); err != nil {
		return nil, err
	}
	acc, err := a.account(r.Context(), req.Account)
	if err != nil {
		return nil, err
	}
	t := store.Token{Name: req.Name, Permissions: req.Permissions}
	if t.Permissions == nil {
		e := a.book.account(acc.ID)
		t.Permissions = permissionsOf(&e)
	}
	if req.Seconds < 0 || req.Seconds > int64(maxTokenLife/time.Second) {
		return nil, &adminapi.Error{Text: "a token is good for a hundred years at most", Hint: "leave --ttl out for one that does not expire"}
	}
	if req.Seconds > 0 {
		t.Expires = time.Now().Add(time.Duration(req.Seconds) * time.Second)
	}
	secret, t, err := a.store.AddToken(r.Context(), acc.ID, t)
	if err != nil {
		return nil, explainStore(err, fmt.Sprintf("the permissions are %v; `nbd admin token list` has the names", allPermissions))
	}
	return adminapi.AddedToken{Secret: secret, TokenInfo: tokenInfo(acc.Name, t)}, nil
}

func (a *Admin) removeToken(r *http.Request) (any, error) {
	acc, err := a.account(r.Context(), r.URL.Query().Get("account"))
	if err != nil {
		return nil, err
	}
	name := r.URL.Query().Get("name")
	t, err := a.store.RemoveToken(r.Context(), acc.ID, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, &adminapi.Error{Text: fmt.Sprintf("account %s has no token %q", acc.Name, clip(name)), Hint: "see `nbd admin token list`"}
	}
	if err == nil {
		a.disconnect(func(c *Client) bool { return c.Token == t.ID })
	}
	return struct{}{}, err
}

// readJSON reads a request's body.
func readJSON(r *http.Request, v any) error {
	if err := json.NewDecoder(r.Body).Decode(v); err != nil {
		return &adminapi.Error{Text: "malformed request: " + err.Error()}
	}
	return nil
}
