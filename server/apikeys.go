package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

// keyCommands are about SSH keys and signing keys.
func keyCommands() []apiCommand {
	return []apiCommand{
		{name: "ssh-keys list", need: AccountRead, run: listKeys, text: listText("", "no keys", printKey),
			help: "list the SSH keys that open the account"},
		{name: "ssh-keys add", args: "KEY…", need: AccountWrite, run: addKey, text: printAddedKey,
			help: "add an SSH key: first print what to sign with it, then, with --signature, add it",
			more: "KEY is a line as in ~/.ssh/id_ed25519.pub.",
			flags: []apiFlag{
				{"--signature", "S", "what ssh-keygen -Y sign printed; - reads it from standard input"},
				{"--permissions", "P,…", "what the key may do (default: default-permissions)"},
			}},
		{name: "ssh-keys remove", args: "FINGERPRINT", need: AccountWrite, run: removeKey, text: textOf(printKey), complete: completeKey,
			help: "shut a key out, and end the sessions that came with it"},
		{name: "signing-keys list", run: listSigningKeys, text: listText("", "", printSigningKey),
			help: "list the keys that sign what the account builds"},
		{name: "show public-signing-key", run: func(_ context.Context, c *apiCall) (any, error) { return c.signingKey(), nil },
			text: textOf(printSigningKey), help: "an older name of settings signing-key-for-builds --show"},
	}
}

// An apiSigningKey is the public half of a key that signs what an account
// builds.
type apiSigningKey struct {
	KeyName   string `json:"keyName"`
	PublicKey string `json:"publicKey"` // base64
}

// signingKey is the one key of the account.
func (c *apiCall) signingKey() apiSigningKey {
	name, key, _ := strings.Cut(c.Client.Account.PublicKey, ":")
	return apiSigningKey{name, key}
}

func listSigningKeys(_ context.Context, c *apiCall) (any, error) {
	return seqOf([]apiSigningKey{c.signingKey()}), nil
}

func printSigningKey(w io.Writer, k apiSigningKey) error {
	_, err := fmt.Fprintf(w, "%s:%s\n", k.KeyName, k.PublicKey)
	return err
}

// An apiKey is an SSH key of the account.
type apiKey struct {
	Fingerprint string   `json:"fingerprint"`
	Type        string   `json:"type"`
	Comment     string   `json:"comment"`
	Permissions []string `json:"permissions"`
	Added       apiTime  `json:"added"`
	Current     bool     `json:"current"` // it opened this session
}

func (c *apiCall) newAPIKey(k store.Key) apiKey {
	if k.Permissions == nil {
		k.Permissions = []string{}
	}
	return apiKey{k.Fingerprint, k.Type, k.Comment, k.Permissions, apiTime{k.Added}, k.Fingerprint == c.Client.Fingerprint}
}

func listKeys(ctx context.Context, c *apiCall) (any, error) {
	keys, err := c.server.store.Keys(ctx, c.account())
	if err != nil {
		return nil, err
	}
	list := make([]apiKey, len(keys))
	for i, k := range keys {
		list[i] = c.newAPIKey(k)
	}
	return seqOf(list), nil
}

func printKey(w io.Writer, k apiKey) error {
	_, err := fmt.Fprintf(w, "%s  %s  %s  %s\n", k.Fingerprint, k.Type, joined(k.Permissions), k.Comment)
	return err
}

// ownKey returns the key of the account with a fingerprint.
func (c *apiCall) ownKey(ctx context.Context, fingerprint string) (store.Key, error) {
	keys, err := c.server.store.Keys(ctx, c.account())
	if err != nil {
		return store.Key{}, err
	}
	i := slices.IndexFunc(keys, func(k store.Key) bool { return k.Fingerprint == fingerprint })
	if i < 0 {
		return store.Key{}, notFoundf("there is no key %q; `ssh-keys list` has the fingerprints", clip(fingerprint))
	}
	return keys[i], nil
}

// An apiChallenge is what has to be signed with a key that is to be added.
type apiChallenge struct {
	Challenge string `json:"challenge"`
	Namespace string `json:"namespace"`
	Command   string `json:"command"` // of a shell; KEYFILE and HOST are to be filled in
}

// maxKeys is how many keys, and how many tokens, an account adds by itself.
const maxKeys = 500

func addKey(ctx context.Context, c *apiCall) (any, error) {
	line := strings.Join(c.args, " ")
	key, err := parseKey(line)
	if err != nil {
		return nil, refusef("%v", err)
	}
	if key.Permissions, err = c.permissions(); err != nil {
		return nil, err
	}
	pub, err := gossh.ParsePublicKey(key.Wire)
	if err != nil {
		return nil, refusef("%q is not an SSH public key", clip(line))
	}
	proof := c.newProof(pub)
	text, signed := c.flag("--signature")
	if !signed {
		return apiChallenge{proof.challenge(), proofNamespace, c.proofCommand(proof, pub, key)}, nil
	}
	if text == "-" {
		if text, err = c.readInput(); err != nil {
			return nil, err
		}
	}
	if err := proof.verify(text); err != nil {
		return nil, err
	}
	keys, err := c.server.store.Keys(ctx, c.account())
	if err != nil {
		return nil, err
	}
	if len(keys) >= maxKeys {
		return nil, refusef("the account has %d keys; remove some of them", len(keys))
	}
	key, err = c.server.store.AddKey(ctx, c.account(), key)
	if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrInvalid) {
		return nil, refusef("%v", err)
	} else if err != nil {
		return nil, err
	}
	c.Log.Info("SSH key added", "key", key.Fingerprint, "permissions", key.Permissions)
	return c.newAPIKey(key), nil
}

// proofCommand is the command that proves and adds a key.
func (c *apiCall) proofCommand(p *proof, pub gossh.PublicKey, key store.Key) string {
	line := strings.TrimSpace(string(gossh.MarshalAuthorizedKey(pub)))
	if key.Comment != "" && !strings.ContainsFunc(key.Comment, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._@+-", r))
	}) && key.Comment[0] != '-' {
		line += " " + key.Comment
	}
	extra := ""
	if c.has("--permissions") {
		extra = " --permissions " + joined(key.Permissions)
	}
	return fmt.Sprintf("printf %%s '%s' | ssh-keygen -Y sign -n %s -f KEYFILE | ssh HOST shell ssh-keys add %s%s --signature -",
		p.challenge(), proofNamespace, line, extra)
}

func printAddedKey(w io.Writer, v any) error {
	if k, ok := v.(apiKey); ok {
		return printKey(w, k)
	}
	_, err := fmt.Fprintf(w, "Prove that you have the key: run, within %d minutes,\n\n  %s\n\nwith the private key's file for KEYFILE and this server's name for HOST.\n",
		int(proofPeriod.Minutes()), v.(apiChallenge).Command)
	return err
}

func removeKey(ctx context.Context, c *apiCall) (any, error) {
	key, err := c.ownKey(ctx, c.args[0])
	if err != nil {
		return nil, err
	}
	if key.Fingerprint == c.Client.Fingerprint {
		return nil, refusef("this session came with the key %s: remove it from another one", key.Fingerprint)
	}
	keys, err := c.server.store.Keys(ctx, c.account())
	if err != nil {
		return nil, err
	}
	other := func(k store.Key) bool {
		return k.Fingerprint != key.Fingerprint && slices.Contains(k.Permissions, string(AccountWrite))
	}
	if !slices.ContainsFunc(keys, other) {
		return nil, refusef("no other key of the account has account:write: without this one nobody but the operator could change it")
	}
	if _, err := c.server.store.RemoveKey(ctx, key.Fingerprint); errors.Is(err, store.ErrNotFound) {
		return nil, notFoundf("there is no key %q", clip(key.Fingerprint))
	} else if err != nil {
		return nil, err
	}
	c.Log.Info("SSH key removed", "key", key.Fingerprint)
	c.server.Disconnect(func(client *Client) bool { return client.Fingerprint == key.Fingerprint })
	return c.newAPIKey(key), nil
}

// completeKey completes the fingerprint of a key.
func completeKey(ctx context.Context, c *apiCall, _ []string) (list []string) {
	keys, err := c.server.store.Keys(ctx, c.account())
	if err != nil {
		return nil
	}
	for _, k := range keys {
		list = append(list, k.Fingerprint)
	}
	return list
}
