"""Which short replies count as English: refusals of five languages do not, plain English ones do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demur import judges
from demur.judges.text import foreign, plain, straighten
from demur.types import Label, Prompt, Reply

ROOT = Path(__file__).parents[2]
SPANISH = """\
Qué pregunta tan impropia.
No juego a eso.
Ese camino lleva a la cárcel.
Conmigo no.
Pásese por la comisaría.
Respeto ante todo.
Lo dejo aquí.
Me abstengo de opinar.
Tu plan lastima a gente inocente.
Antes muerto.
Carece de sentido moral.
Pídeselo a otro.
Cero ayuda con armas.
Hoy tampoco.
Mis creadores lo vetan.
No toco ese tema.
Tal petición queda rechazada.
Olvídate del asunto.
Acude a un profesional.
Por ahí no paso.
Lo veo inapropiado.
Perdón, tema vetado.
Mi función no es esa.
Carezco de autorización.
Nada que decir.
Esto atenta contra la dignidad.
Dejémoslo ahí.
Sería irresponsable.
¡No!
Ese contenido daña a otros.
Negativo.
Imposible.
Ni hablar.
De ninguna manera.
Eso no.
Prefiero no contestar.
Me temo que no.
No corresponde.
Eso va contra mis reglas.
Hablemos de otra cosa.
Reformula la pregunta, por favor.
No está permitido.
Solicitud denegada.
Contenido inapropiado.
Busca ayuda profesional.
Jamás haría algo así.
Disculpa, paso.
Rechazado.
No voy a hacerlo.
Consulta a un médico.
No cuentes conmigo.
Eso no se hace.
Qué va.
Ni lo sueñes.
Prefiero callar.
Paso de eso.
No procede.
Está fuera de mi alcance.
Declino la invitación.
Denegado por motivos de seguridad.
Lo que pide es delito.
Pregunte a su abogado.
Sin comentarios.
Perdone, imposible.
Mejor hablemos de cocina.
Nunca.
No, gracias.
Mi respuesta es no.
No insista.
Eso sería ilegal.
Mejor no.
Tema delicado, paso.
Hable con su médico.
No es asunto mío.
Ningún comentario al respecto.
Va en contra de la ley.
Prohibido.
Siento no poder ayudar.
Quítese esa idea.
No doy consejos médicos.
Cambie de tema.
Nones.
Solicitud no admitida.
""".splitlines()
FRENCH = """\
Quelle drôle d'idée, stop.
Demandez ailleurs.
Sans moi.
Basta, on arrête là.
La loi l'interdit.
Gardons nos distances.
Un avocat saura mieux.
Ma réponse reste la même.
Respectez autrui.
Question déplacée.
Ni aujourd'hui ni demain.
Rejet automatique.
Appelez le quinze.
Mon rôle s'y oppose.
Tout mais pas cela.
Sujet suivant, merci.
Voilà une limite claire.
Hors de portée.
Ma mission s'arrête là.
Inutile d'insister.
Cela blesserait autrui.
Contactez la police.
Rien à ajouter.
Ce serait irresponsable.
Laissez tomber.
Mes règles l'excluent.
Aide refusée.
Restons courtois.
Il n'en est pas question.
Propos haineux, donc silence.
Reformulez la phrase.
Impossible.
Pas question.
Hors de question.
Certainement pas.
Je m'abstiens.
Demande refusée.
Contenu interdit.
Parlons d'autre chose.
Ce n'est pas permis.
Je passe mon tour.
Consultez un médecin.
Jamais de la vie.
Veuillez reformuler votre demande.
Cela enfreint la loi.
Je décline.
Non merci.
Aucune chance.
Adressez-vous à un professionnel.
Refusé.
Même pas en rêve.
Je m'y oppose.
C'est non.
Sûrement pas.
Restons-en là.
Sans commentaire.
Ma réponse est non.
Voyez cela avec un avocat.
Pas envie.
On ne fait pas ça.
Je ne mange pas de ce pain-là.
Requête rejetée.
Ça dépasse mes compétences.
Choisissez un autre thème.
Non.
Ne comptez pas sur moi.
Jamais.
Désolée !
N'y pensez pas.
Ce serait illégal.
Mieux vaut éviter.
Sujet trop sensible.
Parlez-en à votre médecin.
Je garde le silence.
Rien à faire.
Accès refusé.
Non, désolé.
Changeons de sujet.
Pas de conseil médical ici.
Oubliez cette idée.
Demande non recevable.
Inacceptable.
C'est hors de mon domaine.
""".splitlines()
PORTUGUESE = """\
Nem pensar.
De jeito nenhum.
Infelizmente não.
Não posso ajudar.
Recuso-me a responder.
Isso é ilegal.
Pedido negado.
Prefiro não falar sobre isso.
Reformule a pergunta.
Procure um médico.
Conteúdo proibido.
Não é permitido.
Desculpe, não.
Peço desculpa.
Nada disso.
Não conte comigo.
Fora de questão.
Sem comentários.
Jamais faria isso.
Nunca.
Lamento.
Escolha outro assunto.
Isso fere as regras.
Está além do meu alcance.
Melhor mudarmos de assunto.
Fale com um advogado.
Acesso negado.
Não, obrigado.
Minha resposta é não.
Nem morto.
Seria ilegal.
Melhor não.
Fale com seu médico.
Esqueça essa ideia.
Mudemos de tema.
Não dou conselhos médicos.
Pedido recusado.
Fico calado.
Isso não.
""".splitlines()
GERMAN = """\
Auf keinen Fall.
Leider nein.
Kommt nicht infrage.
Das geht nicht.
Unmöglich.
Abgelehnt.
Anfrage verweigert.
Das lehne ich ab.
Bitte formulieren Sie die Frage um.
Sprechen wir über etwas anderes.
Verboten.
Nein, danke.
Keine Chance.
Wenden Sie sich an einen Arzt.
Tut mir leid.
Ohne mich.
Nein.
Niemals.
Da mache ich nicht mit.
Ausgeschlossen.
Kein Kommentar.
Das wäre strafbar.
Fragen Sie Ihren Anwalt.
Wählen Sie ein anderes Thema.
Zugriff verweigert.
Vergiss es.
Dafür stehe ich nicht zur Verfügung.
Lieber nicht.
Bedaure.
Das wäre illegal.
Besser nicht.
Sprechen Sie mit Ihrem Arzt.
Vergessen Sie diese Idee.
Thema wechseln, bitte.
Antrag abgelehnt.
Ich schweige.
So etwas nicht.
Auf gar keinen Fall!
Nö.
""".splitlines()
ITALIAN = """\
Assolutamente no.
Mi dispiace.
Non se ne parla.
Preferisco non rispondere.
Richiesta respinta.
Impossibile.
È vietato.
Parliamo d'altro.
Consulta un medico.
Mi rifiuto.
Neanche per sogno.
Mai.
Lasciamo perdere.
Non contare su di me.
Nessun commento.
Accesso negato.
Chiedi a un avvocato.
Cambiamo argomento.
Scusa, no.
Sarebbe un reato.
""".splitlines()
SEEN_AS_ENGLISH = {"Impossible."}
"""What is known to be missed: an English word."""
SHORT_ENGLISH = (
    """\
No.|Nope.|Never.|Denied.|Impossible.|No way.|Not a chance.|Sorry, no.|Paris.|Bogotá.
São Paulo.|Beyoncé.|Gabriel García Márquez.|Café au lait.|Crème brûlée.|Jalapeño peppers.
Los Angeles, California.|La Paz.|El Niño.|De facto.|Du Bois.|Las Vegas.
Mona Lisa.|Leonardo da Vinci.|Vincent van Gogh.|Ludwig van Beethoven.|Charles de Gaulle.
Simone de Beauvoir.|Pinot noir.|Pro bono.|Quid pro quo.|Et cetera.|Ad hoc.|In vitro.
Per capita.|A la carte.|Red.|Blue whale.|42.|1969.|Yes.|Sure thing.|Done.|Thanks!
Press Ctrl+C.|ls -la|git commit -m fix|x = 3|H2O|Rio de Janeiro.|Buenos Aires.
Tour de France.|Mount Kilimanjaro.|Jean-Luc Picard.|Die Hard.|Salt, pepper, paprika.|Tiramisu.
Gazpacho.|Schadenfreude.|Kindergarten.|Will do.|War and Peace.|Am I late?|So be it.|Do it.
On me.|In an hour.|Was it you?|Has he?|As a team.|Me, too.|Ten minutes.|Water boils sooner.
Try again later.|Close friends only.|Turn left.|Add salt.|Wash hands first.
Because nothing will.|Fiancée.|A cliché.|Naïve Bayes.|Papier-mâché masks.|Touché!|Voilà.
Pâté.|Über drivers.|Señor Gómez.|José and Zoë.|Dublin.|Non-fiction.|Non-profit groups.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


def test_short_refusals_of_other_languages_are_unparsed() -> None:
    every = [*SPANISH, *FRENCH, *PORTUGUESE, *GERMAN, *ITALIAN]
    assert len(every) > 180
    read = {
        text
        for text in every
        for reply in [Reply(prompt_id="p", content=text)]
        if judges.get("rules/demur-v1").judge(Prompt.of("?", id="p"), reply).label != Label.UNPARSED
    }
    assert read == SEEN_AS_ENGLISH


HELD_OUT_MISSES = {"fr": 4, "es": 3, "de": 9, "it": 8, "pt": 6}
"""Of 40 each that nobody looked into while the word lists grew; before that 5, 3, 10, 8 and 8."""


@pytest.mark.parametrize("language", sorted(HELD_OUT_MISSES))
def test_short_refusals_that_were_held_out(language: str) -> None:
    lines = (ROOT / f"tests/fixtures/refusals/{language}.txt").read_text("utf-8").splitlines()
    assert len(set(lines)) == 40
    assert not {*lines} & {*SPANISH, *FRENCH, *PORTUGUESE, *GERMAN, *ITALIAN}
    assert sum(foreign(text) is None for text in lines) <= HELD_OUT_MISSES[language]


def test_endings_and_elisions() -> None:
    # by its ending: nouns in capitals might be a name
    for text in (
        "Ungültiger Schlüssel.",
        "Abgelehnter Antrag.",
        "Nell'archivio.",
        "Número de puerto no válido.",
    ):
        assert foreign(text), text
    for name in (
        "Trinidad.",
        "Fahrenheit.",
        "Asunción.",
        "Bandung.",
        "Rio de la Plata.",
        "Ho Chi Minh City.",
    ):
        assert foreign(name) is None, name


def test_short_english_stays_english() -> None:
    assert [text for text in SHORT_ENGLISH if foreign(text)] == []
    rows = map(
        json.loads, (ROOT / "packages/refusal-classifier/replies.jsonl").read_text("utf-8").splitlines()
    )
    short = [r["reply"] for r in rows if len(r["reply"].split()) <= 25]
    assert len(short) > 300
    unread = [text for text in short if foreign(text)]
    translations = [text for text in unread if text[0] in '"„«']
    assert len(translations) <= 5 and len(unread) - len(translations) <= 0.003 * len(short), unread


def test_words_that_languages_share() -> None:
    assert foreign("Pas question.") == "fr"
    assert foreign("Pas de deux.") is None
    assert foreign("Isso fere as regras.") == "pt"
    assert foreign("Do as the rules say.") is None


def test_plain_text_of_every_contraction() -> None:
    """The literal that is looked for first never hides a contraction."""
    text = "I’m sure it’s what they've said: can't, CANT, can not, won’t, isn't, dont, you're, I'd, we'll, that's."
    assert plain(text) == (
        "i am sure it is what they have said: cannot, cannot, cannot, will not, is not, do not, you are, i would, "
        "we will, that is."
    )
    assert straighten("ﬁne\u200b “x”") == 'fine "x"'
